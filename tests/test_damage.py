"""A damaged file of a run ends in one line with the remedy and leaves the run as it was, or in the same numbers."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from runs import one_device, open_run, tiny_config

from jmlr_jax import cli
from jmlr_jax.config_io import RESOLVED_NAME, save_resolved
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import PlaceError, disk_trouble, read_sealed, write_sealed
from jmlr_jax.run.checks import checksums, differing
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import trained
from jmlr_jax.training.loop import train_phase

CLOCK = ("speed.jsonl", "cost.json", "timing.json")
TRAIN = {"steps": 8, "refresh_steps": 3, "refresh_delay": 2, "checkpoint_steps": 4}


@pytest.fixture(scope="module")
def middle(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose joint arm stands at step 4 of 8, a refresh under way."""
    folder = tmp_path_factory.mktemp("damage") / "middle"
    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        train_phase(open_run(tiny_data, folder, train=TRAIN), PHASES["jmlr"], Console(quiet=True))
        shutil.copytree(folder, folder.with_name("whole"))
        for left in ("weights", "checkpoints/8"):
            shutil.rmtree(folder / "arms" / "jmlr" / left)
        yield folder


@pytest.fixture
def hurt(middle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage."""
    one_device(monkeypatch)
    shutil.copytree(middle, tmp_path / "run")
    return tmp_path / "run"


def content(run: Path) -> dict[str, str]:
    """Digests of a run's files; what a clock measures left out."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts and path.name not in CLOCK
    }


def trains(run: Path) -> None:
    """Continues the joint arm, as `jmlr train` does."""
    train_phase(open_run(run, run, train=TRAIN), PHASES["jmlr"], Console(quiet=True))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def digit(file: Path) -> None:
    """Another number in the first line of metrics."""
    first, rest = file.read_text().split("\n", 1)
    row = json.loads(first)
    row["loss/answer"] += 0.25
    file.write_text(json.dumps(row) + "\n" + rest)


DAMAGES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None], str]] = {
    "checkpoint cut": (lambda arm: largest(arm / "checkpoints/4/state"), cut, "checkpoints/4: .*remove that directory"),
    "checkpoint gone": (lambda arm: largest(arm / "checkpoints/4/state"), Path.unlink, "checkpoints/4: "),
    "table cut": (lambda arm: arm / "tables/step_0000003.npz", cut, "step_0000003.npz: cannot be read"),
    "table gone": (lambda arm: arm / "tables/step_0000003.npz", Path.unlink, "step_0000003.npz: is gone"),
    "metrics": (lambda arm: arm / "metrics.jsonl", digit, "metrics.jsonl: changed since it was written"),
    "record": (lambda arm: arm / "made_from.json", cut, "made_from.json: not a record"),
    "tokens flipped": (lambda arm: arm.parents[1] / "data/tokens/references.ids.npy", flip, "ids.npy: changed since"),
    "tokens gone": (lambda arm: arm.parents[1] / "data/tokens/train.gold.ids.npy", Path.unlink, "ids.npy: is gone"),
    "card": (lambda arm: arm.parents[1] / "data/prepare.json", flip, "prepare.json: changed since it was written"),
}


ALWAYS = ("checkpoint cut", "table gone", "metrics", "tokens flipped")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.exhaustive) for name in DAMAGES]
)
def test_damage_is_refused_and_changes_nothing(hurt: Path, name: str) -> None:
    where, damage, said = DAMAGES[name]
    damage(where(hurt / "arms" / "jmlr"))
    before = content(hurt)
    with pytest.raises(JmlrError, match=said) as told:
        trains(hurt)
    assert "\n" not in str(told.value) and content(hurt) == before


@pytest.mark.exhaustive
def test_another_phase_s_checkpoint_is_refused(hurt: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Of the same shapes, whole, and not this run's."""
    other = tmp_path / "other"
    train_phase(
        open_run(tiny_data, other, train=TRAIN | {"generator": {"learning_rate": 0.01}}),
        PHASES["jmlr"],
        Console(quiet=True),
    )
    shutil.rmtree(hurt / "arms/jmlr/checkpoints/4")
    shutil.copytree(other / "arms/jmlr/checkpoints/4", hurt / "arms/jmlr/checkpoints/4")
    with pytest.raises(JmlrError, match="checkpoints/4: changed since it was written .*another step or phase"):
        trains(hurt)


def test_undamaged_it_continues_to_the_same_end(hurt: Path, middle: Path) -> None:
    trains(hurt)
    whole = middle.with_name("whole")
    metrics = "arms/jmlr/metrics.jsonl"
    assert (hurt / metrics).read_bytes() == (whole / metrics).read_bytes()
    assert (hurt / "arms/jmlr/checks.json").read_text() == (whole / "arms/jmlr/checks.json").read_text()


def test_weights_of_another_content_are_told(middle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage library does not notice every flip: the checksums do."""
    one_device(monkeypatch)
    shutil.copytree(middle.with_name("whole"), tmp_path / "run")
    checks = tmp_path / "run/arms/jmlr/checks.json"
    known = json.loads(checks.read_text())
    name = next(iter(known["halves"]["generator"]))
    known["halves"]["generator"][name] = "0" * 16  # as if the array had another content
    checks.write_text(json.dumps(known))
    run = open_run(tmp_path / "run", tmp_path / "run", train=TRAIN)
    with pytest.raises(JmlrError, match=r"weights/generator: changed since it was written \(.*remove .*weights and"):
        trained(run, "jmlr", "generator")
    trained(run, "jmlr", "retriever")


# Pieces


def test_checksums_tell_every_flip_and_every_move() -> None:
    rng = np.random.default_rng(0)
    for array in (
        rng.normal(size=(3, 5)).astype(np.float32),
        rng.integers(0, 9, 7).astype(np.int32),
        np.array(3, np.int32),
        rng.normal(size=6).astype(np.float16),
        np.array([True, False]),
    ):
        known = checksums({"a": array})
        assert differing({"a": array.copy()}, known) == []
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for place in range(len(flat)):
            for bit in range(1 if array.dtype == bool else 8):
                flipped = flat.copy()
                flipped[place] ^= 1 << bit
                assert differing({"a": flipped.view(array.dtype).reshape(array.shape)}, known) == ["['a']"]
    rows = rng.normal(size=(4, 3)).astype(np.float32)
    assert differing({"a": rows[::-1]}, checksums({"a": rows})) == ["['a']"]
    assert differing({"a": rows, "b": rows}, checksums({"a": rows})) == ["['b']"]


def test_checksums_do_not_depend_on_where_the_parts_lie() -> None:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 4), ("a", "b"))
    array = np.random.default_rng(1).normal(size=(4, 8, 3)).astype(np.float32)
    wanted = checksums({"x": array})
    for spec in (PartitionSpec(), PartitionSpec("a", "b"), PartitionSpec(None, ("b", "a")), PartitionSpec("b")):
        assert checksums({"x": jax.device_put(array, NamedSharding(mesh, spec))}) == wanted


def test_sealed_figures(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"train": 1.25})
    assert read_sealed(tmp_path / "a.json") == {"train": 1.25} and read_sealed(tmp_path / "none.json") == {}
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("1.25", "1.26"))
    with pytest.raises(PlaceError, match=r"a.json: changed since it was written; remove it"):
        read_sealed(tmp_path / "a.json")


@pytest.mark.parametrize("damage", ["edited", "cut", "empty"])
def test_the_record_of_what_was_asked(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / RESOLVED_NAME
    save_resolved(tiny_config(tmp_path), file)
    text = file.read_text()
    changed = text.replace("steps: 12", "steps: 13")
    assert changed != text
    file.write_text({"edited": changed, "cut": text[: len(text) // 2], "empty": ""}[damage])
    assert cli.main(["eval", "--run-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{file}: changed since it was written" in err.splitlines()[-1]
    if damage == "edited":  # meant so
        file.write_text(changed.split("\n", 1)[1])
        assert cli.main(["print-config", "--run-dir", str(tmp_path)]) == 0
        assert "steps: 13" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "/runs/a: no space left; free some"),
        (OSError(errno.EROFS, "Read-only file system", "/runs/a"), "/runs/a: nothing can be written there"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/a"), "/runs/a: this user has no permission"),
        (ValueError('INTERNAL: Error writing "/runs/a/b": No space left on device'), "/runs/a/b: no space left"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/runs/a"), "/runs/a: no such file or directory"),
        (ValueError("something else"), None),
    ],
)
def test_what_is_said_of_a_disk(error: Exception, said: str | None) -> None:
    found = disk_trouble(error)
    assert found is None if said is None else found is not None and found.startswith(said)
    try:
        raise RuntimeError("a library's own") from error
    except RuntimeError as around:
        again = disk_trouble(around)
    assert said is None or isinstance(error, FileNotFoundError) or (again is not None and again.startswith(said))


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise ValueError('Error writing "/runs/a/checkpoints/2": [Errno 28] No space left on device')

    monkeypatch.setitem(cli.COMMANDS, "eval", cli.COMMANDS["eval"]._replace(act=full))
    assert cli.main(["eval"]) == 2
    assert (
        capsys.readouterr().err == "jmlr: /runs/a/checkpoints/2: no space left; free some, the same command continues\n"
    )
