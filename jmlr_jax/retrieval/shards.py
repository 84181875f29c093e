"""Shards of a corpus over several processes, and the best of what all of them found, by a collective.

Every process calls the same functions in the same order with the same questions, as any program of ``jax.distributed``
does. The collective is an all-gather over one device of each process; what it moves is N x k numbers, never vectors.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlr_jax.retrieval.tokens import best_of


def shard_rows(passages: int, process: int, processes: int) -> range:
    """The rows that a process holds: contiguous, in order, sizes that differ by one at most.

    >>> [shard_rows(10, process, 4) for process in range(4)]
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]

    Raises:
      ValueError: fewer passages than processes.
    """
    if passages < processes:
        raise ValueError(f"{passages} passages for {processes} processes: some would have none; use fewer processes")
    return range(process * passages // processes, (process + 1) * passages // processes)


def best_of_all(row_NxH: np.ndarray, score_NxH: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`jmlr_jax.retrieval.tokens.best_of` over what all processes found, in each of them; a collective.

    The processes may have found different numbers of rows for their N questions.
    """
    row_NxK, score_NxK = best_of(row_NxH, score_NxH, k)
    if jax.process_count() == 1:
        return row_NxK, score_NxK
    row_SxNxK, score_SxNxK = _all(row_NxK), _all(score_NxK)
    return best_of(np.concatenate(list(row_SxNxK), axis=1), np.concatenate(list(score_SxNxK), axis=1), k)


def _all(array: np.ndarray) -> np.ndarray:
    """One array of the same shape from each process, stacked in process order: an all-gather on the devices."""
    devices = [next(d for d in jax.devices() if d.process_index == p) for p in range(jax.process_count())]
    mesh = Mesh(np.array(devices), ("process",), axis_types=(jax.sharding.AxisType.Auto,))
    apart, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    local = jax.device_put(array[None], devices[jax.process_index()])
    whole = jax.make_array_from_single_device_arrays((len(devices), *array.shape), apart, [local])
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated)(whole))
