"""Checkpoints of everything a resumed run needs to continue bit for bit, on Orbax.

One manager per phase keeps the latest few and the best by dev loss. A checkpoint holds the training state (both
halves' trained weights and optimizer moments, step, counters, key), the candidate table and the refresh under way, and
as JSON the data position and the metrics of the last adoption. Orbax writes each to a temporary directory and renames
it, so that a crash leaves the one before. The notes hold checksums of the arrays and name the phase they are of.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jmlr_jax.errors import first_line
from jmlr_jax.files import disk_trouble
from jmlr_jax.run.checks import checksums, differing
from jmlr_jax.run.open import DataError

DEV_LOSS = "dev/loss"
REMEDY = "remove that directory to continue from an earlier one, or the phase's directory to start it again"


class Checkpoints:
    """The checkpoints of one phase.

    Args:
      folder: where they lie.
      keep_last: how many of the latest stay; the best by dev loss stays besides.
      of: digest of the phase's recipe; checkpoints of another one are refused.

    Raises:
      DataError: what lies there cannot be read.
    """

    def __init__(self, folder: Path, keep_last: int, of: str = ""):
        latest = preservation_policy.LatestN(n=keep_last)
        best = preservation_policy.BestN(get_metric_fn=lambda metrics: -metrics[DEV_LOSS], n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            best_fn=lambda metrics: -metrics[DEV_LOSS],
            enable_async_checkpointing=True,
        )
        self.folder, self._of = folder, of
        with self._told(None):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any, tables: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Saves in the background; ``notes`` is JSON and may hold the dev loss by which the best is chosen."""
        sums = {"state": checksums(state), "tables": checksums(tables)}
        notes = {**notes, "checks": {"of": self._of, "step": step, "notes": _seal(notes), **sums}}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), tables=ocp.args.StandardSave(tables), notes=ocp.args.JsonSave(notes)
            ),
            metrics={DEV_LOSS: notes.get(DEV_LOSS, math.inf)},  # Orbax complains of a checkpoint without any
        )

    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        with self._told(None):
            return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the one with the lowest dev loss; the latest where none was measured."""
        with self._told(None):
            return self._manager.best_step()  # of equal ones, as unmeasured ones are, the latest

    def restore(self, step: int, state: Any, tables: dict[str, np.ndarray]) -> tuple[Any, Any, dict[str, Any]]:
        """State, tables and notes of a step; the first two arguments say in what shapes, dtypes and shardings.

        Raises:
          DataError: the checkpoint does not fit, with Orbax's account of why, or is not what was saved.
        """
        with self._told(step):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state),
                    tables=ocp.args.StandardRestore(tables),
                    notes=ocp.args.JsonRestore(),
                ),
            )
            checks = dict(found.notes.pop("checks"))
            state_sums, table_sums = dict(checks["state"]), dict(checks["tables"])
        changed = [*differing(found.state, state_sums), *differing(found.tables, table_sums)]
        changed += ["notes"] if checks.get("notes") != _seal(found.notes) else []
        changed += ["it is of another step or phase"] if (checks["of"], checks["step"]) != (self._of, step) else []
        if changed:
            raise DataError(f"{self._place(step)}: changed since it was written ({', '.join(changed[-3:])}); {REMEDY}")
        return found.state, found.tables, found.notes

    @contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        """What the storage library raises in the block, of whatever kind, as one line with the remedy."""
        try:
            yield
        except Exception as error:
            if disk_trouble(error) is not None:
                raise
            raise DataError(f"{self._place(step)}: cannot be restored ({first_line(error)}); {REMEDY}") from error

    def _place(self, step: int | None) -> Path:
        return self.folder if step is None else self.folder / str(step)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _seal(notes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
