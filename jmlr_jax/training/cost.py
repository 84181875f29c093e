"""What a phase of training has cost, beside its weights: ``arms/PHASE/cost.json`` with ``seconds`` and ``flops``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jmlr_jax.files import read_sealed, write_sealed
from jmlr_jax.parallel.distributed import is_first, on_first
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
    on_first(lambda: read_sealed(file))  # a damaged one is told before anything is done
    try:
        yield
    finally:
        if is_first():
            seconds = read_sealed(file).get("seconds", 0.0) + time.monotonic() - start
            write_sealed(file, {"seconds": round(seconds, 3), "flops": _flops(run, phase)})


def _flops(run: Run, phase: Phase) -> dict[str, float]:
    generator = run.cfg.generator.model_copy(update={"llama": run.llama})
    cfg = run.cfg.model_copy(update={"generator": generator, "retriever": run.retriever})
    train, steps, asked = run.cfg.train, phase_steps(run.cfg.train, phase), len(run.prepared.questions("train"))
    read = train.refresh_steps + train.refresh_delay if phase.rank and train.refresh_steps else steps
    asked = min(asked, read * train.batch_size)  # only what will be read is looked up
    return phase_work(cfg, phase, steps, len(run.prepared.passages), asked + len(run.dev_rows))
