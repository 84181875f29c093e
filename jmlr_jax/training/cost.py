"""What a phase of training has cost, beside its weights: ``arms/PHASE/cost.json`` with ``seconds`` and ``flops``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jmlr_jax.files import write_text
from jmlr_jax.parallel.distributed import is_first
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import Phase
from jmlr_jax.run.weights import COST, phase_folder, phase_steps
from jmlr_jax.run.work import phase_work


@contextmanager
def costed(run: Run, phase: Phase) -> Iterator[None]:
    """Adds the seconds spent inside to those of the phase, interrupted or not; process 0 writes.

    ``flops`` are the least that the whole phase needs, by part (:func:`jmlr_jax.run.work.phase_work`).
    """
    start, file = time.monotonic(), phase_folder(run, phase.name) / COST
    try:
        yield
    finally:
        if is_first():
            before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
            cost = {"seconds": round(before + time.monotonic() - start, 3), "flops": _flops(run, phase)}
            write_text(file, json.dumps(cost, indent=1) + "\n")


def _flops(run: Run, phase: Phase) -> dict[str, float]:
    generator = run.cfg.generator.model_copy(update={"llama": run.llama})
    cfg = run.cfg.model_copy(update={"generator": generator, "retriever": run.retriever})
    train, steps, asked = run.cfg.train, phase_steps(run.cfg.train, phase), len(run.prepared.questions("train"))
    if phase.rank and train.refresh_steps:  # only what will be read is looked up
        asked = min(asked, (train.refresh_steps + train.refresh_delay) * train.batch_size)
    return phase_work(cfg, phase, steps, len(run.prepared.passages), asked + len(run.dev_rows))
