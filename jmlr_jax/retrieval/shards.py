"""An index in shards, asked as one: in however many it was built, and by however many processes it is asked.

Each process finds the best of the shards it holds, and a collective the best of all. Every process calls the same
functions in the same order with the same questions, as any program of ``jax.distributed`` does. The collective is an
all-gather over one device of each process; what it moves is N x k numbers, never vectors.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlr_jax.parallel.distributed import from_first, gather
from jmlr_jax.retrieval.store import Index, IndexUnusable, open_index, read_card
from jmlr_jax.retrieval.tokens import best_of
from jmlr_jax.retrieval.vectors import check_allowed, check_queries


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


def shard_folder(folder: Path, number: int, count: int) -> Path:
    """Where one of ``count`` shards of the index of ``folder`` lies; a whole index is its only shard.

    >>> shard_folder(Path("initial"), 1, 4).as_posix(), shard_folder(Path("initial"), 0, 1).as_posix()
    ('initial/shard_1_of_4', 'initial')
    """
    return folder if count == 1 else folder / f"shard_{number}_of_{count}"


def shard_fingerprint(corpus_fingerprint: str, rows: range, passages: int) -> str:
    """Of a part of a corpus; of all of it, the corpus's own."""
    return corpus_fingerprint if len(rows) == passages else f"{corpus_fingerprint} rows {rows.start} to {rows.stop}"


class Shards:
    """An index over a corpus of which each process holds some shards; every shard is held by one process.

    Attributes:
      held: rows of the corpus and the index over them.
      passages: of the whole corpus.
    """

    def __init__(self, held: list[tuple[range, Index]], passages: int):
        self.held, self.passages = held, passages

    @classmethod
    def open(cls, folder: Path, model_fingerprint: str, corpus_fingerprint: str, passages: int) -> Shards:
        """Opens the index of this retriever and corpus, whole or in shards; every process must call it.

        Args:
          folder: holds ``card.json``, or ``shard_I_of_N/`` for every I.
          model_fingerprint, corpus_fingerprint: see :func:`jmlr_jax.retrieval.store.open_index`.
          passages: of the corpus.

        Raises:
          IndexUnusable: there is none, or a file of it is missing, changed or unknown.
          DistributedError: process 0 found none.
        """

        def shard(number: int, count: int) -> tuple[range, Path, str]:
            rows = shard_rows(passages, number, count)
            return rows, shard_folder(folder, number, count), shard_fingerprint(corpus_fingerprint, rows, passages)

        def found() -> int:
            """The number of shards that are all there and of this retriever and corpus."""
            problem: IndexUnusable | None = None
            for count in _counts(folder, passages):
                try:
                    for number in range(count):
                        _, home, corpus = shard(number, count)
                        read_card(home, model_fingerprint, corpus)
                    return count
                except IndexUnusable as error:
                    problem = error
            assert problem is not None
            raise problem

        count, held, said = from_first(found), [], ""
        try:
            for number in range(jax.process_index(), count, jax.process_count()):
                rows, home, corpus = shard(number, count)
                held.append((rows, open_index(home, model_fingerprint, corpus)))
        except (IndexUnusable, OSError) as error:
            said = str(error)
        if problems := [each for each in gather(said) if each]:  # told by all, so that none waits for another
            raise IndexUnusable(problems[0])
        return cls(held, passages)

    def __len__(self) -> int:
        return self.passages

    def search(self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`; the same in every process, each of which must call it.

        Each shard gives its own best, so that no fewer hits are scored than in one index over everything.

        Raises:
          ValueError: as the index of one process does.
        """
        return best_of_all(*self.held_best(q_NxQxC, k, allowed_N), k)

    def held_best(
        self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`search`, among the shards of this process alone, without a word to the others."""
        # Checked here too, so that all processes refuse what only some would; each index knows its width.
        check_queries(q_NxQxC, q_NxQxC.shape[-1], k)
        check_allowed(allowed_N, self.passages)
        # Of no shard: a process beyond their number has something to gather too.
        found = [np.full((len(q_NxQxC), k), -1, np.int32)]
        scores = [np.full((len(q_NxQxC), k), -np.inf, np.float32)]
        for rows, index in self.held:
            here = None if allowed_N is None else allowed_N[rows.start : rows.stop]
            row_NxK, score_NxK = index.search(q_NxQxC, k, here)
            found.append(np.where(row_NxK >= 0, row_NxK + rows.start, -1).astype(np.int32))
            scores.append(score_NxK)
        return best_of(np.concatenate(found, axis=1), np.concatenate(scores, axis=1), k)


def _counts(folder: Path, passages: int) -> list[int]:
    """Numbers of shards to look for: the whole index first, then those of which there is a folder."""
    named = (path.parent.name.rpartition("_of_")[2] for path in folder.glob("shard_*_of_*/card.json"))
    return [1, *sorted({int(name) for name in named if name.isdecimal() and 1 < int(name) <= passages})]
