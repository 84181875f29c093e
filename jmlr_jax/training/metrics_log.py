"""Metrics of a phase on disk and on screen, read one step late so that the device never waits for the host.

``metrics.jsonl`` holds only what is determined by configuration and data, so a resumed run ends with the very file of
an uninterrupted one; what a clock measures goes to ``speed.jsonl``. Both also go to TensorBoard event files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from jmlr_jax.files import write_text
from jmlr_jax.parallel.distributed import is_first
from jmlr_jax.parallel.progress import Stage

SHOWN = {
    "loss/answer": "answer loss",
    "loss/rank": "rank loss",
    "rank/pair_accuracy": "pairs right",
    "recall/candidates": "recall@K",
}


class MetricsLog:
    """Writes the metrics of one phase; use as a context manager. Of several processes only the first writes.

    Args:
      folder: the phase's directory.
      name, steps: of the phase, shown while it trains.
      every: steps between lines of the files; the last step is always written.
      questions: per step, for the speed.
      step: steps done already; what the files hold of later ones was lost in a crash and is cut off.
      seconds: what else the clock knows, in seconds from any start; its fraction of the time between lines is written
        under the same name.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        every: int,
        questions: int,
        step: int,
        seconds: Callable[[], dict[str, float]] = dict,
    ):
        self.folder, self.steps, self.every, self.questions = folder, steps, every, questions
        self._writes = is_first()
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("metrics.jsonl", "speed.jsonl"):
                if (folder / file).exists():  # nothing is done yet: not even what was measured before the first
                    write_text(folder / file, lines_until(folder / file, step or -1))
        self._waiting: tuple[int, dict[str, Any], dict[str, float]] | None = None
        self._clock, self._clock_step, self._tokens = time.monotonic(), step, 0.0
        self._seconds, self._seconds_before = seconds, seconds()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step, write_to_disk=self._writes)
        self._stage = Stage(f"training {name}", steps, "steps", done=step, per=(questions, "questions"))

    def __enter__(self) -> MetricsLog:
        self._stage.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._stage.__exit__(error, *rest)
        self._board.close()

    def push(self, step: int, metrics: dict[str, Any], extra: dict[str, float]) -> dict[str, float]:
        """Takes the metrics of a step that has just been sent off; returns those of the step before, now read.

        Args:
          step: steps done with this one.
          metrics: scalars still on the device.
          extra: numbers known already, such as recall and staleness of the table in use.
        """
        ready = self.flush()
        self._waiting = step, metrics, extra
        return ready

    def flush(self) -> dict[str, float]:
        """Reads and writes the step that is still waiting."""
        if self._waiting is None:
            return {}
        step, metrics, extra = self._waiting
        self._waiting = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()} | extra
        self._tokens += row.get("prompt/tokens", 0.0)
        if step % self.every == 0 or step == self.steps:
            self._write("metrics.jsonl", step, row)
            seconds, done = time.monotonic() - self._clock, step - self._clock_step
            speed = {
                "speed/questions_per_s": done * self.questions / seconds,
                "speed/tokens_per_s": self._tokens / seconds,
            }
            spent = self._seconds()
            speed |= {name: (s - self._seconds_before[name]) / seconds for name, s in spent.items()}
            self._seconds_before = spent
            self._write("speed.jsonl", step, speed)
            self._clock, self._clock_step, self._tokens = time.monotonic(), step, 0.0
        self._stage.update(step, ", ".join(f"{label} {row[name]:.3f}" for name, label in SHOWN.items() if name in row))
        return row

    def note(self, step: int, row: dict[str, float]) -> None:
        """A line of its own, such as a dev evaluation."""
        self._write("metrics.jsonl", step, row)

    def _write(self, name: str, step: int, row: dict[str, float]) -> None:
        if not self._writes:
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for key, value in row.items():
            self._board.add_scalar(key, value, step)


def lines_until(path: Path, step: int) -> str:
    """The lines of a metrics file up to `step`; a half-written last one is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the line a crash cut short belongs to a step that is done again
    return "".join(kept)
