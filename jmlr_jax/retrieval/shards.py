"""One corpus over several processes: each indexes its share, a question goes to all, their best merge by a collective.

Every process calls the same functions in the same order with the same questions, as any program of ``jax.distributed``
does. The collective is an all-gather over one device of each process; what it moves is N x hits numbers, never vectors.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.build import sample_rows
from jmlr_jax.retrieval.encoding import passage_vectors, plain_encoding, reduced
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.scann import ScannIndex, build_part, encoding_sample, learn_code
from jmlr_jax.retrieval.tokens import BATCHES, best_of
from jmlr_jax.retrieval.vectors import EncodeRows, TokenVectors, check_allowed, check_queries


def share_of(passages: int, process: int, processes: int) -> range:
    """The rows that a process holds: contiguous, in order, sizes that differ by one at most.

    >>> [share_of(10, process, 4) for process in range(4)]
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]

    Raises:
      ValueError: fewer passages than processes.
    """
    if passages < processes:
        raise ValueError(f"{passages} passages for {processes} processes: some would have none; use fewer processes")
    return range(process * passages // processes, (process + 1) * passages // processes)


class ShardedIndex:
    """This process's share of an index over a whole corpus.

    Attributes:
      own: index of the share.
      rows: rows of the corpus that it holds.
      passages: of the whole corpus.
    """

    def __init__(self, own: ExactIndex | ScannIndex, rows: range, passages: int):
        if len(own) != len(rows):
            raise ValueError(f"an index of {len(own)} passages for a share of {len(rows)} rows")
        self.own, self.rows, self.passages = own, rows, passages

    @classmethod
    def build(cls, encode: EncodeRows, passages: int, cfg: IndexConfig, seed: int = 0) -> ShardedIndex:
        """Encodes and indexes this process's share; every process must call it.

        All draw the same partitions from the seed. Code and directions are those of the first process, learned from a
        sample of the whole corpus, so that a passage is coded alike wherever it lies.

        Args:
          encode: gives the vectors of any rows on this process's own devices.
          passages: of the whole corpus; ``cfg.kind`` "auto" goes by this number.
          cfg: as for :func:`jmlr_jax.retrieval.build.build_index`; nothing is tuned, ``cfg.rerank`` hits are scored.
          seed: of all random draws.
        """
        rows = share_of(passages, jax.process_index(), jax.process_count())
        own_rows = np.arange(rows.start, rows.stop)
        if cfg.kind == "exact" or (cfg.kind == "auto" and passages < cfg.exact_below):
            pieces = list(encode(own_rows))
            vectors = TokenVectors(
                np.concatenate([piece.vectors_NxPxC for piece in pieces]),
                np.concatenate([piece.keep_NxP for piece in pieces]),
            )
            return cls(ExactIndex(vectors), rows, passages)
        sampled = sample_rows(passages, seed)
        # Each process encodes its share of the sample: nobody waits for the first.
        part = share_of(len(sampled), jax.process_index(), jax.process_count())
        found = list(encode(sampled[part.start : part.stop]))
        tokens_TxC = np.concatenate([piece.vectors_NxPxC[piece.keep_NxP] for piece in found])
        corpus_tokens = int(_sum_over_processes(len(tokens_TxC)) / len(sampled) * passages)
        code = learn_code(_rows_of_all(tokens_TxC), corpus_tokens, cfg, seed)
        encoding = plain_encoding(cfg, tokens_TxC.shape[1], seed)
        # The same sampled passages as one process would take, each encoded where it is.
        wanted = encoding_sample(len(sampled), seed)
        here = np.flatnonzero(np.isin(np.arange(part.start, part.stop), wanted))
        sample_nxF = np.concatenate([passage_vectors(encoding, piece) for piece in found])[here]
        encoding = reduced(encoding, _rows_of_all(sample_nxF), cfg.directions)
        if jax.process_count() > 1:  # what the first process learned holds for all
            encoding, code = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all((encoding, code)))
        made = build_part(encoding, code, encode(own_rows), len(own_rows))
        entries = np.arange(len(own_rows))
        return cls(ScannIndex(encoding, code, (made,), entries, cfg.rerank, made.how.leaves_searched), rows, passages)

    def __len__(self) -> int:
        return self.passages

    def search(self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`; rows are of the whole corpus, the same in every process.

        With ScaNN the hits of all shares are cut to the best ``hits`` of the whole corpus before any is scored: the
        result is that of one index, and the scoring is shared out.

        Raises:
          ValueError: as the index of one process does.
        """
        check_queries(q_NxQxC, self.own.dim, k)
        check_allowed(allowed_N, self.passages)
        if not len(q_NxQxC):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        here = None if allowed_N is None else allowed_N[self.rows.start : self.rows.stop]
        if isinstance(self.own, ExactIndex):
            return best_of_all(*self._placed(*self.own.search(q_NxQxC, k, here)), k)
        rows, scores = [], []
        for first in range(0, len(q_NxQxC), BATCHES[-1]):
            q = q_NxQxC[first : first + BATCHES[-1]]
            hits = min(max(self.own.hits, k), self.passages)
            own_NxH = self._own(best_of_all(*self._placed(*self.own.nearest(q, hits, here)), hits)[0])
            fewer = self.own.kept(hits, k)
            if fewer < hits:
                rough = self._placed(own_NxH, self.own.rough_score(q, own_NxH))
                own_NxH = self._own(best_of_all(*rough, fewer)[0])
            row, score = best_of_all(*self._placed(own_NxH, self.own.score(q, own_NxH)), k)
            rows.append(row)
            scores.append(score)
        return np.concatenate(rows), np.concatenate(scores)

    def _placed(self, row: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the share as rows of the corpus."""
        return np.where(row >= 0, row + self.rows.start, -1).astype(np.int32), score.astype(np.float32)

    def _own(self, row: np.ndarray) -> np.ndarray:
        """Rows of the corpus as rows of the share, -1 for those of another."""
        return np.where((row >= self.rows.start) & (row < self.rows.stop), row - self.rows.start, -1)


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
    apart, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    local = jax.device_put(array[None], devices[jax.process_index()])
    whole = jax.make_array_from_single_device_arrays((len(devices), *array.shape), apart, [local])
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(whole))


def _sum_over_processes(value: int) -> int:
    return int(_all(np.array([value], np.int32)).sum())


def _rows_of_all(array: np.ndarray) -> np.ndarray:
    """The rows that the processes hold, in process order; they may hold different numbers of them."""
    counts = _all(np.array([len(array)], np.int32))[:, 0]
    padded = np.zeros((int(counts.max()), array.shape[1]), array.dtype)
    padded[: len(array)] = array
    return np.concatenate([part[:count] for part, count in zip(_all(padded), counts, strict=True)])
