"""Which checkpoints stay, which is the best, and that nobody complains on the way."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from jmlr_jax.training.checkpoint import DEV_LOSS, Checkpoints

STATE = {"w": np.arange(3.0)}
TABLES = {"train": np.zeros((1, 2), np.int32)}


def saved(folder: Path, losses: dict[int, float | None]) -> Checkpoints:
    """Checkpoints of these steps and dev losses (None: not measured), the last one kept besides the best."""
    writer = Checkpoints(folder, keep_last=1)
    for step, loss in losses.items():
        writer.save(step, STATE, TABLES, {} if loss is None else {DEV_LOSS: loss})
    writer.close()
    return Checkpoints(folder, keep_last=1)


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ({1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: None}, [2, 5], 2),
        ({1: None, 2: None, 3: None}, [3], 3),
        ({1: 0.1, 2: 0.1}, [2], 2),
    ],
)
def test_the_latest_and_the_best_stay(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    losses: dict[int, float | None],
    kept: list[int],
    best: int,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = saved(tmp_path, losses)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == kept
    assert (found.best(), found.latest()) == (best, max(losses))
    found.close()
    assert [r.getMessage() for r in caplog.records if "metric" in r.getMessage()] == []
