"""The search for the fastest settings of a slice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_plan import small

from jmlr_jax import cli, config_io
from jmlr_jax.config import Config, EvalConfig
from jmlr_jax.planning import report as plan_report
from jmlr_jax.planning.chips import GIB
from jmlr_jax.planning.programs import PlanError
from jmlr_jax.planning.search import AXES, SCOPED, Look, Search, Trial, applied

EVERY = Look("all")
# What a made-up compiler takes a step to last, and memory in GiB; the best is away from where the search begins.
REMAT = {"none": (1.0, 3.0), "dots": (1.1, 2.5), "mlp": (1.2, 2.0), "attention": (1.3, 1.5), "full": (1.5, 1.0)}


def made_up(self: Search, cfg: Config, flags: dict[str, str], settings: dict[str, Any], of: str) -> Trial:
    slower, held = REMAT[cfg.generator.llama.remat]
    size, tensor = cfg.train.batch_size, cfg.mesh.tensor
    if size % (cfg.mesh.data * cfg.mesh.fsdp * cfg.train.accumulate):
        return Trial(settings, None, 15 * GIB, None, None, "does not divide", of)
    used = held * GIB * size / 8 / cfg.train.accumulate
    seconds = slower * (size + 4) * tensor * (0.9 if flags[SCOPED] == str(96 << 10) else 1) + 0.1 * cfg.train.accumulate
    return Trial(settings, used, 15 * GIB, seconds, 0.5, None if used < 14 * GIB else "too large", of)


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
    own = {"mesh.data": 2, "mesh.fsdp": 2, "train.batch_size": 12, "eval.batch_size": 6}
    shapes = {tuple(change.values()) for change in AXES["mesh"](own, 4)}
    assert shapes == {(1, 4, 1, 8), (2, 2, 1, 8), (4, 1, 1, 8), (1, 2, 2, 6), (2, 1, 2, 6), (1, 1, 4, 6)}
    assert [change["train.batch_size"] for change in AXES["batch"](own, 4)] == [4, 8, 16, 32]
    assert [change["train.accumulate"] for change in AXES["accumulate"](own, 4)] == [1, 2, 3, 4, 6, 12]
    with pytest.raises(PlanError, match="no axis meshes; there are mesh, batch, accumulate, remat, memory, and all"):
        Look("remat,meshes")


def test_the_best_is_found_one_axis_after_the_other(compiled: list[str]) -> None:
    search = Search(small(), None, EVERY)
    best = search.run()
    s = best.settings
    assert (s["mesh.tensor"], s["generator.llama.remat"], s[SCOPED]) == (1, "none", 96 << 10)
    assert best is search.ranked()[0] and best.why is None
    assert s["train.batch_size"] == 32 and len(compiled) == len(set(compiled)) == len(search.trials)
    # No single change would be faster.
    cfg, _ = applied(small(), s)
    for change in ({"generator.llama.remat": "dots"}, {"train.accumulate": 1}, {SCOPED: 64 << 10}):
        other = Search(cfg, None, EVERY)._try(s | change)
        assert other.questions_an_hour <= best.questions_an_hour
    assert best.words.startswith("LIBTPU_INIT_ARGS='--xla_tpu_scoped_vmem_limit_kib=98304' jmlr run mesh.data=")
    held = Search(small(), None, Look("mesh,remat")).run().settings
    assert (held["train.batch_size"], held[SCOPED]) == (8, 64 << 10)


def test_it_begins_where_a_run_would(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mesh for another slice, weights over all chips; microbatches that divide no other batch; the flag given."""
    other = small(accumulate=3, batch_size=12)
    other = other.model_copy(
        update={"mesh": other.mesh.model_copy(update={"fsdp": 16}), "eval": EvalConfig(batch_size=6)}
    )
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{SCOPED}=16384")
    search = Search(other, None, EVERY)
    own = search._own()
    assert (own["mesh.data"], own["mesh.fsdp"], own["mesh.tensor"]) == (1, 4, 1)
    assert own[SCOPED] == 16384 and own["eval.batch_size"] == 8
    assert search.run().why is None
    cfg = config_io.load("medquad_smollm", ["generator.llama.vocab_size=64", "retriever.bert.vocab_size=64"])
    assert applied(cfg, own)[0].mesh.fsdp == 4  # keys that are not set stay so: its lengths exceed their defaults


def test_what_was_tried_is_not_tried_again(compiled: list[str], tmp_path: Path) -> None:
    file = tmp_path / "kept" / "tried.jsonl"
    told: list[Trial] = []
    with pytest.raises(PlanError, match=r"--budget and --tried are of a search"):
        Look(budget=3.0)
    at_once, look = Look("all", 1e-9, str(file)), Look("all", tried=str(file))
    first = Search(small(), None, at_once, told.append).run()  # the time is up at once: where it began
    assert first.settings["generator.llama.remat"] == "full" and len(compiled) == len(told) == 1
    best = Search(small(), None, look).run()
    done = len(compiled)
    assert done == len(file.read_text().splitlines())
    with file.open("a") as kept:
        kept.write('{"settings": ')  # a process that was killed as it wrote
    again = Search(small(), None, look)
    assert again.run().settings == best.settings and len(compiled) == done
    Search(applied(small(), best.settings)[0], None, at_once).run()
    assert len(compiled) == done  # the same settings, though the search began elsewhere
    Search(small(sampled=3), None, at_once).run()
    assert len(compiled) == done + 1  # another configuration is another step
    assert len(Search(small(), None, look).known) == done + 1
    for bad in ("{}", '{"settings": 1, "used": 1, "available": 1, "seconds": 1, "mfu": 1, "why": null, "of": "x"}'):
        file.write_text(bad + "\n")
        with pytest.raises(PlanError, match=r"tried\.jsonl:1: no trial"):
            Search(small(), None, look)
    file.write_bytes(b"\xff\n")
    with pytest.raises(PlanError, match=r"tried\.jsonl:1: no trial"):
        Search(small(), None, look)


def test_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Search, cfg: Config, flags: Any, settings: dict[str, Any], of: str) -> Trial:
        return Trial(settings, 20.0 * GIB, 15 * GIB, None, None, "20.0 of 15.0 GiB", of)

    monkeypatch.setattr(Search, "_compiled", too_large)
    with pytest.raises(
        PlanError, match=r"none of \d+ settings fits; the nearest: 20.0 of 15.0 GiB; take a larger slice"
    ):
        Search(small(), None, EVERY).run()
    with pytest.raises(PlanError, match="none of 1 settings fits.*; give it a longer --budget"):
        Search(small(), None, Look("all", 1e-9)).run()


def test_command(monkeypatch: pytest.MonkeyPatch, compiled: list[str], tmp_path: Path, capsys: Any) -> None:
    def planned(cfg: Config, topology: str | None, lengths: Any, flags: dict[str, str]) -> None:
        assert cfg.generator.llama.remat == "none" and flags == {SCOPED: str(96 << 10)}
        raise PlanError("as far as this goes")

    monkeypatch.setattr(plan_report, "make_plan", planned)
    args = ["plan", "--config", "smoke", "--topology", "v5e:2x2", "generator.llama.remat=full"]
    assert cli.main([*args, "--search", "all", "--budget", "5", "--tried", str(tmp_path / "tried")]) == 2
    said = capsys.readouterr()
    assert "as far as this goes" in said.err and "fastest: LIBTPU_INIT_ARGS=" in said.out
    rates = [json.loads(line)["seconds"] for line in (tmp_path / "tried").read_text().splitlines()]
    assert len(rates) == len(compiled) > 5
    assert cli.main([*args, "--budget", "5"]) == 2
    assert "give --search too" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_by_the_compiler() -> None:
    """Flags reach the compiler; what does not divide, and what the compiler refuses, are trials that say why."""
    search = Search(small(), None, EVERY)
    first = search._try(search._own())
    assert first.why is None and first.seconds is not None and math.isfinite(first.seconds)
    for change, why in (
        ({"mesh.fsdp": 1, "mesh.tensor": 4}, "heads"),
        ({"train.accumulate": 3}, "train.accumulate=3 does not divide the batch"),
        ({"xla_tpu_no_such_flag": 1}, "No such compile option"),
    ):
        one = search._try(first.settings | change)
        assert one.why is not None and why in one.why and one.questions_an_hour == 0
