"""Exact MaxSim over a whole corpus on the device: the oracle of approximate indexes, the index of small corpora."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.retrieval.vectors import TokenVectors, check_queries
from jmlr_jax.scoring import maxsim

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
    first_row: Array,
    rows: Array,
) -> tuple[Array, Array]:
    """Best K so far of every question, after one more block of passages; rows past ``rows`` are padding."""
    k = best_score_GxbxK.shape[-1]
    p_NxPxC = p_NxPxC.astype(jnp.float32)
    offset_N = jnp.arange(len(p_NxPxC), dtype=jnp.int32)

    def one(q_QxC: Array) -> Array:
        return maxsim(q_QxC[None], p_NxPxC[None], keep_NxP[None])[0]

    def group(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_bxQxC, score_bxK, row_bxK = args
        new_bxN = jnp.where(offset_N < rows, jax.vmap(one)(q_bxQxC), -jnp.inf)
        # Older rows come first and top_k is stable, so equal scores keep the order of the corpus.
        score_bxE = jnp.concatenate([score_bxK, new_bxN], axis=1)
        row_bxE = jnp.concatenate([row_bxK, jnp.broadcast_to(first_row + offset_N, new_bxN.shape)], axis=1)
        score_bxK, at_bxK = jax.lax.top_k(score_bxE, k)
        return score_bxK, jnp.take_along_axis(row_bxE, at_bxK, axis=1)

    return jax.lax.map(group, (q_GxbxQxC, best_score_GxbxK, best_row_GxbxK))


class ExactIndex:
    """Scores every passage. Blocks travel from the host, so device memory does not grow with the corpus.

    Shapes are static: one compilation per (number of questions rounded up, k).
    """

    kind = "exact"

    def __init__(self, vectors: TokenVectors):
        self.vectors = vectors

    def search(self, q_NxQxC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`; a block crosses to the device once per call.

        Raises:
          ValueError: width of the queries differs from the index, or k is below 1.
        """
        passages, passage_tokens, dim = self.vectors.vectors_NxPxC.shape
        check_queries(q_NxQxC, dim, k)
        questions, query_tokens, _ = q_NxQxC.shape
        if questions == 0:
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        groups = -(-questions // QUERY_BATCH)
        padded = np.zeros((groups * QUERY_BATCH, query_tokens, dim), np.float32)
        padded[:questions] = q_NxQxC
        q_GxbxQxC = jnp.asarray(padded.reshape(groups, QUERY_BATCH, query_tokens, dim))
        score = jnp.full((groups, QUERY_BATCH, k), -jnp.inf, jnp.float32)
        row = jnp.full((groups, QUERY_BATCH, k), -1, jnp.int32)
        size = block_size(passages, query_tokens, passage_tokens)
        for first in range(0, passages, size):
            p_NxPxC, keep_NxP = (
                self.vectors.vectors_NxPxC[first : first + size],
                self.vectors.keep_NxP[first : first + size],
            )
            rows = len(p_NxPxC)
            if rows < size:
                p_NxPxC = np.pad(p_NxPxC, ((0, size - rows), (0, 0), (0, 0)))
                keep_NxP = np.pad(keep_NxP, ((0, size - rows), (0, 0)))
            score, row = _merge_block(score, row, q_GxbxQxC, p_NxPxC, keep_NxP, np.int32(first), np.int32(rows))
        score_NxK = np.asarray(score).reshape(-1, k)[:questions]
        row_NxK = np.asarray(row).reshape(-1, k)[:questions]
        return np.where(np.isneginf(score_NxK), -1, row_NxK).astype(np.int32), score_NxK
