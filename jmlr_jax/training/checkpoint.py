"""Checkpoints of everything a resumed run needs to continue bit for bit, on Orbax.

One manager per phase keeps the latest few and the best by dev loss. A checkpoint holds the training state (both
halves' trained weights and optimizer moments, step, counters, key), the candidate table and the refresh under way, and
as JSON the data position and the metrics of the last adoption. Orbax writes each to a temporary directory and renames
it, so that a crash leaves the one before.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jmlr_jax.run.open import DataError

DEV_LOSS = "dev/loss"


class Checkpoints:
    """The checkpoints of one phase.

    Args:
      folder: where they lie.
      keep_last: how many of the latest stay; the best by dev loss stays besides.
    """

    def __init__(self, folder: Path, keep_last: int):
        latest = preservation_policy.LatestN(n=keep_last)
        best = preservation_policy.BestN(get_metric_fn=lambda metrics: -metrics[DEV_LOSS], n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            best_fn=lambda metrics: -metrics[DEV_LOSS],
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.folder = folder

    def save(self, step: int, state: Any, tables: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Saves in the background; ``notes`` is JSON and may hold the dev loss by which the best is chosen."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), tables=ocp.args.StandardSave(tables), notes=ocp.args.JsonSave(notes)
            ),
            metrics={DEV_LOSS: notes.get(DEV_LOSS, math.inf)},  # Orbax complains of a checkpoint without any
        )

    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the one with the lowest dev loss; the latest where none was measured."""
        return self._manager.best_step()  # of equal ones, as unmeasured ones are, the latest

    def restore(self, step: int, state: Any, tables: dict[str, np.ndarray]) -> tuple[Any, Any, dict[str, Any]]:
        """State, tables and notes of a step; the first two arguments say in what shapes, dtypes and shardings.

        Raises:
          DataError: the checkpoint does not fit, with Orbax's account of why.
        """
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state),
                    tables=ocp.args.StandardRestore(tables),
                    notes=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, FileNotFoundError) as error:
            raise DataError(
                f"{self.folder / str(step)}: cannot be restored ({error}); remove that directory to continue from an "
                "earlier one, or the phase's directory to start it again"
            ) from error
        return found.state, found.tables, found.notes

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
