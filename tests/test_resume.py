"""A phase that was interrupted ends with the bytes of one that was not: metrics file and final weights."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment
from rich.console import Console
from runs import assert_same_weights, one_device, open_run, tiny_config

from jmlr_jax.config_io import save_resolved
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import load_weights
from jmlr_jax.training import loop as module
from jmlr_jax.training.loop import train_phase


class Killed(Exception):
    """Stands for the end of the process."""


def finish(run: Run, arm: str = "jmlr") -> tuple[bytes, dict]:
    """Trains to the end; metrics file and weights."""
    folder = train_phase(run, PHASES[arm], Console(quiet=True))
    parts = [path.name for path in sorted(folder.iterdir())]
    weights = {part: load_weights(folder / part, run.abstract((part,))[part]) for part in parts}
    return (folder.parent / "metrics.jsonl").read_bytes(), weights


def interrupt(monkeypatch, run: Run, what: str, times: int) -> None:
    """Trains until `what` of the training module is called for the ``times + 1``-th time."""
    left, original = iter(range(times)), getattr(module, what)

    def dies(*args, **kwargs):
        if next(left, None) is None:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, what, dies)
        train_phase(run, PHASES["jmlr"], Console(quiet=True))


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        return finish(open_run(tiny_data, tmp_path_factory.mktemp("whole")))


# Refreshes start before steps 4 and 8 and are adopted before 6 and 10, checkpoints are taken after 5, 10 and 12.
@pytest.mark.parametrize("died_at", [3, 5, 9], ids=["no checkpoint", "before adoption", "two refreshes"])
def test_interrupted_in_the_loop(uninterrupted, tiny_data, tmp_path, monkeypatch, died_at):
    one_device(monkeypatch)
    run = open_run(tiny_data, tmp_path)
    # Each step places one batch.
    interrupt(monkeypatch, run, "place", died_at)
    file = tmp_path / "arms" / "jmlr" / "metrics.jsonl"
    assert file.read_bytes() != uninterrupted[0]
    with file.open("a") as half:
        half.write('{"step": 9, "loss/ans')
    metrics, weights = finish(open_run(tiny_data, tmp_path))
    assert metrics == uninterrupted[0]
    assert_same_weights(weights, uninterrupted[1])


@pytest.mark.exhaustive
def test_interrupted_with_adapters_on_the_retriever(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    adapters = {"lora": {"rank": 2}}
    whole = finish(open_run(tiny_data, tmp_path / "whole", retriever=adapters))
    interrupt(monkeypatch, open_run(tiny_data, tmp_path / "stopped", retriever=adapters), "place", 9)
    metrics, weights = finish(open_run(tiny_data, tmp_path / "stopped", retriever=adapters))
    assert metrics == whole[0]
    assert_same_weights(weights, whole[1])


def test_interrupted_while_the_final_weights_are_written(uninterrupted, tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    interrupt(monkeypatch, open_run(tiny_data, tmp_path), "save_weights", 1)
    folder = tmp_path / "arms" / "jmlr"
    assert not (folder / "weights").exists() and (folder / ".weights.part").exists()
    metrics, weights = finish(open_run(tiny_data, tmp_path))
    assert metrics == uninterrupted[0]
    assert_same_weights(weights, uninterrupted[1])


# For real: processes, and signals from outside.

SLOWER = {"steps": 40, "refresh_steps": 10, "refresh_delay": 4, "checkpoint_steps": 5}


class Command:
    """``python -m jmlr_jax train`` in a run directory."""

    def __init__(self, data: Path, run_dir: Path) -> None:
        self.run_dir, self.folder = run_dir, run_dir / "arms" / "jmlr"
        shutil.copytree(data, run_dir / "data")
        save_resolved(tiny_config(run_dir, train=SLOWER), run_dir / "config.yaml")

    def start(self) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "jmlr_jax", "train", "--run-dir", str(self.run_dir)]
        env = environment()
        return subprocess.Popen(words, env=env, text=True, stderr=subprocess.PIPE)

    def to_the_end(self) -> tuple[bytes, dict]:
        process = self.start()
        _, said = process.communicate()
        assert process.returncode == 0, said
        return finish(Run.open(tiny_config(self.run_dir, train=SLOWER)))  # finished: only reads

    def signalled(self, number: int, wait: float) -> tuple[int, str]:
        """Status and stderr of a process that gets the signal so many seconds after its next checkpoint."""
        known = self.checkpoints()
        process = self.start()
        while self.checkpoints() <= known and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(number)
        _, said = process.communicate()
        return process.returncode, said

    def checkpoints(self) -> set[str]:
        folder = self.folder / "checkpoints"
        return {path.name for path in folder.iterdir() if path.name.isdecimal()} if folder.exists() else set()


@pytest.mark.exhaustive
def test_signals_from_outside(tiny_data, tmp_path, monkeypatch):
    """SIGTERM saves and says so; kill -9 at a random moment loses nothing; both runs end with the same bytes."""
    one_device(monkeypatch)
    whole = Command(tiny_data, tmp_path / "whole").to_the_end()
    command = Command(tiny_data, tmp_path / "stopped")
    status, said = command.signalled(signal.SIGTERM, 0.05)
    assert status == 2, said
    last = max(map(int, command.checkpoints()))
    assert f"jmlr: SIGTERM: jmlr saved at step {last} of 40; the same command continues" in said
    assert not (command.folder / "weights").exists() and "Traceback" not in said and "DEBUG" not in said
    status, said = command.signalled(signal.SIGKILL, random.random() / 4)
    assert status == -signal.SIGKILL and not (command.folder / "weights").exists(), said
    metrics, weights = command.to_the_end()
    assert metrics == whole[0]
    assert_same_weights(weights, whole[1])
