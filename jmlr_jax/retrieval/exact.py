"""Exact MaxSim over a whole corpus on the device: the oracle of approximate indexes, the index of small corpora."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.method.scoring import maxsim
from jmlr_jax.retrieval.tokens import trimmed
from jmlr_jax.retrieval.vectors import TokenVectors, check_allowed, check_queries

QUERY_BATCH = 8
SIMILARITY_BYTES = 128 * 2**20  # of the float32 similarities alive at once on the device


def block_size(passages: int, query_tokens: int, passage_tokens: int) -> int:
    """Passages scored at once against QUERY_BATCH questions, so that their similarities stay in SIMILARITY_BYTES.

    >>> block_size(10_000, 32, 128)
    1024
    >>> block_size(300, 32, 128)
    300
    """
    return max(1, min(passages, SIMILARITY_BYTES // (4 * QUERY_BATCH * query_tokens * passage_tokens)))


@partial(jax.jit, donate_argnums=(0, 1))
def _merge_block(
    best_score_GxbxK: Array,
    best_row_GxbxK: Array,
    q_GxbxQxC: Array,
    p_NxPxC: Array,
    keep_NxP: Array,
    allowed_N: Array,
    first_row: Array,
) -> tuple[Array, Array]:
    """Best K so far of every question, after one more block of passages; those not allowed are never among them."""
    k = best_score_GxbxK.shape[-1]
    p_NxPxC = p_NxPxC.astype(jnp.float32)
    offset_N = jnp.arange(len(p_NxPxC), dtype=jnp.int32)

    def one(q_QxC: Array) -> Array:
        return maxsim(q_QxC[None], p_NxPxC[None], keep_NxP[None])[0]

    def group(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_bxQxC, score_bxK, row_bxK = args
        new_bxN = jnp.where(allowed_N, jax.vmap(one)(q_bxQxC), -jnp.inf)
        # Older rows come first and top_k is stable, so equal scores keep the order of the corpus.
        score_bxE = jnp.concatenate([score_bxK, new_bxN], axis=1)
        row_bxE = jnp.concatenate([row_bxK, jnp.broadcast_to(first_row + offset_N, new_bxN.shape)], axis=1)
        score_bxK, at_bxK = jax.lax.top_k(score_bxE, k)
        return score_bxK, jnp.take_along_axis(row_bxE, at_bxK, axis=1)

    return jax.lax.map(group, (q_GxbxQxC, best_score_GxbxK, best_row_GxbxK))


class ExactSearch:
    """The best K of some questions over a corpus that comes in pieces, so that it need not be held anywhere.

    Shapes are static: one compilation per (number of questions rounded up, k, block size).

    Args:
      q_NxQxC: questions, see :class:`jmlr_jax.retrieval.vectors.Searcher`.
      k: how many passages.
    """

    def __init__(self, q_NxQxC: np.ndarray, k: int):
        self._questions, self._k = len(q_NxQxC), k
        q_NxQxC = trimmed(q_NxQxC)
        groups = -(-len(q_NxQxC) // QUERY_BATCH)
        padded = np.zeros((groups * QUERY_BATCH, *q_NxQxC.shape[1:]), np.float32)
        padded[: len(q_NxQxC)] = q_NxQxC
        self._q_GxbxQxC = jnp.asarray(padded.reshape(groups, QUERY_BATCH, *q_NxQxC.shape[1:]))
        self._score = jnp.full((groups, QUERY_BATCH, k), -jnp.inf, jnp.float32)
        self._row = jnp.full((groups, QUERY_BATCH, k), -1, jnp.int32)

    def add(self, vectors: TokenVectors, first_row: int, allowed_N: np.ndarray | None = None) -> None:
        """Scores a piece whose passages are the rows from ``first_row`` on; ``allowed_N`` bool leaves some out."""
        passages, passage_tokens, _ = vectors.vectors_NxPxC.shape
        size = block_size(passages, self._q_GxbxQxC.shape[2], passage_tokens)
        for first in range(0, passages if self._questions else 0, size):
            p_NxPxC, keep_NxP = vectors.vectors_NxPxC[first : first + size], vectors.keep_NxP[first : first + size]
            rows = len(p_NxPxC)
            allowed = np.zeros(size, bool)
            allowed[:rows] = True if allowed_N is None else allowed_N[first : first + rows]
            if rows < size:
                p_NxPxC = np.pad(p_NxPxC, ((0, size - rows), (0, 0), (0, 0)))
                keep_NxP = np.pad(keep_NxP, ((0, size - rows), (0, 0)))
            self._score, self._row = _merge_block(
                self._score, self._row, self._q_GxbxQxC, p_NxPxC, keep_NxP, allowed, np.int32(first_row + first)
            )

    def wait(self) -> None:
        """Until all that was added has been scored."""
        jax.block_until_ready(self._row)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows int32 [N, k], -1 where there is no further passage, and MaxSim float32 [N, k], -inf there."""
        score_NxK = np.asarray(self._score).reshape(-1, self._k)[: self._questions]
        row_NxK = np.asarray(self._row).reshape(-1, self._k)[: self._questions]
        return np.where(np.isneginf(score_NxK), -1, row_NxK).astype(np.int32), score_NxK


class ExactIndex:
    """Scores every passage. Blocks travel from the host, so device memory does not grow with the corpus."""

    kind = "exact"

    def __init__(self, vectors: TokenVectors):
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """C, width of a token vector."""
        return self.vectors.vectors_NxPxC.shape[-1]

    def search(self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`; a block crosses to the device once per call.

        Raises:
          ValueError: width of the queries or length of the mask differ from the index, or k is below 1.
        """
        check_queries(q_NxQxC, self.dim, k)
        check_allowed(allowed_N, len(self))
        search = ExactSearch(q_NxQxC, k)
        search.add(self.vectors, 0, allowed_N)
        return search.result()
