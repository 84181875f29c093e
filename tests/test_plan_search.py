"""The search for the fastest settings of a slice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_plan import small

from jmlr_jax import cli
from jmlr_jax.config import Config
from jmlr_jax.planning import report as plan_report
from jmlr_jax.planning.chips import GIB
from jmlr_jax.planning.programs import PlanError
from jmlr_jax.planning.search import SCOPED, Look, Search, Trial, applied, batches, meshes, pieces

# What a made-up compiler takes a step to last, and memory in GiB; the best is away from where the search begins.
REMAT = {"none": (1.0, 3.0), "dots": (1.1, 2.5), "mlp": (1.2, 2.0), "attention": (1.3, 1.5), "full": (1.5, 1.0)}


def made_up(self: Search, cfg: Config, flags: dict[str, str], settings: dict[str, Any], of: str) -> Trial:
    slower, held = REMAT[cfg.generator.llama.remat]
    size, tensor = cfg.train.batch_size, cfg.mesh.tensor
    if size % (cfg.mesh.data * cfg.mesh.fsdp * cfg.train.accumulate):
        return Trial(settings, None, 15 * GIB, None, None, of)
    used = held * GIB * size / 8 / cfg.train.accumulate
    seconds = slower * (size + 4) * tensor * (0.9 if flags[SCOPED] == str(96 << 10) else 1) + 0.1 * cfg.train.accumulate
    return Trial(settings, used, 15 * GIB, seconds if used < 15 * GIB else None, 0.5, of)


@pytest.fixture()
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of what was compiled, by the compiler above."""
    calls: list[str] = []

    def one(self: Search, cfg: Config, flags: dict[str, str], settings: dict[str, Any], of: str) -> Trial:
        calls.append(of)
        return made_up(self, cfg, flags, settings, of)

    monkeypatch.setattr(Search, "_compiled", one)
    return calls


def test_axes() -> None:
    shapes = {tuple(change.values()) for change in meshes({}, 4)}
    assert shapes == {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)}
    own = {"mesh.data": 2, "mesh.fsdp": 2, "train.batch_size": 12}
    assert [change["train.batch_size"] for change in batches(own, 4)] == [4, 8, 16, 32]
    assert [change["train.accumulate"] for change in pieces(own, 4)] == [1, 2, 3, 4, 6, 12]


def test_the_best_is_found_one_axis_after_the_other(compiled: list[str]) -> None:
    search = Search(small(), None)
    best = search.run()
    s = best.settings
    assert (s["mesh.tensor"], s["generator.llama.remat"], s[SCOPED]) == (1, "none", 96 << 10)
    assert best is search.ranked()[0] and best.fits and best.used is not None and best.used < 15 * GIB * 0.95
    assert s["train.batch_size"] == 32 and len(compiled) == len(set(compiled)) == len(search.trials)
    # No single change would be faster.
    cfg, _ = applied(small(), s)
    for change in ({"generator.llama.remat": "dots"}, {"train.accumulate": 1}, {SCOPED: 64 << 10}):
        other = Search(cfg, None)._try(s | change)
        assert other.questions_an_hour <= best.questions_an_hour
    assert best.words.startswith("LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304 mesh.data=")


def test_what_was_tried_is_not_tried_again(compiled: list[str], tmp_path: Path) -> None:
    file = tmp_path / "kept" / "tried.jsonl"
    told: list[Trial] = []
    with pytest.raises(PlanError, match=r"--budget and --tried are of a search"):
        Look(budget=3.0)
    first = Search(small(), None, str(file), told.append).run(0)  # the time is up at once: where it began
    assert first.settings["generator.llama.remat"] == "full" and len(compiled) == len(told) == 1
    best = Search(small(), None, str(file)).run()
    done = len(compiled)
    assert done == len(file.read_text().splitlines())
    with file.open("a") as kept:
        kept.write('{"settings": ')  # a process that was killed as it wrote
    again = Search(small(), None, str(file))
    assert again.run().settings == best.settings and len(compiled) == done
    Search(applied(small(), best.settings)[0], None, str(file)).run(0)
    assert len(compiled) == done  # the same settings, though the search began elsewhere
    Search(small(sampled=3), None, str(file)).run(0)
    assert len(compiled) == done + 1  # another configuration is another step
    file.write_text("{}\n")
    with pytest.raises(PlanError, match=r"tried\.jsonl:1: no trial"):
        Search(small(), None, str(file))


def test_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Search, cfg: Config, flags: Any, settings: dict[str, Any], of: str) -> Trial:
        return Trial(settings, 20.0 * GIB, 15 * GIB, None, None, of)

    monkeypatch.setattr(Search, "_compiled", too_large)
    with pytest.raises(PlanError, match=r"none of \d+ settings fits with 5% to spare: take a larger slice"):
        Search(small(), None).run()


def test_command(monkeypatch: pytest.MonkeyPatch, compiled: list[str], tmp_path: Path, capsys: Any) -> None:
    def planned(cfg: Config, topology: str | None, lengths: Any, flags: dict[str, str]) -> None:
        assert cfg.generator.llama.remat == "none" and flags == {SCOPED: str(96 << 10)}
        raise PlanError("as far as this goes")

    monkeypatch.setattr(plan_report, "make_plan", planned)
    args = ["plan", "--config", "smoke", "--topology", "v5e:2x2", "mesh.fsdp=-1", "generator.llama.remat=full"]
    assert cli.main([*args, "--search", "--budget", "5", "--tried", str(tmp_path / "tried")]) == 2
    said = capsys.readouterr()
    assert "as far as this goes" in said.err and "fastest: LIBTPU_INIT_ARGS=" in said.out
    rates = [json.loads(line)["seconds"] for line in (tmp_path / "tried").read_text().splitlines()]
    assert len(rates) == len(compiled) > 5
    assert cli.main([*args, "--budget", "5"]) == 2
    assert "give --search too" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_by_the_compiler() -> None:
    """Flags reach the compiler, and what does not divide is no trial that fits."""
    search = Search(small(), None)
    first = search._try(search._own())
    assert first.fits and first.seconds is not None and math.isfinite(first.seconds)
    assert not search._try(first.settings | {"mesh.fsdp": 1, "mesh.tensor": 4}).fits  # two heads
    with pytest.raises(Exception, match="No such compile option"):
        search._try(first.settings | {"xla_tpu_no_such_flag": 1})
