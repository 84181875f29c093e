"""k-means of token vectors on the device: nearest centroids in blocks that stay in a CPU's cache, and Lloyd's rounds.

Letters: G centroids, C width of a vector, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROUNDS = 8
BATCH = 8192  # tokens in one call
COMPARED = 256  # tokens compared with all centroids at a time: products that fit a CPU's cache (docs/benchmarks.md)


@jax.jit
def nearest_centroid(x_TxC: Array, centroids_GxC: Array) -> Array:
    """Id of the centroid nearest to each vector, int32 [T]; of equally near ones the first."""
    half_G, number_G = jnp.sum(jnp.square(centroids_GxC), 1) / 2, jnp.arange(len(centroids_GxC), dtype=jnp.int32)

    def nearest(x_C: Array) -> Array:
        score_G = centroids_GxC @ x_C - half_G  # |x - c|^2 without |x|^2, halved, the sign turned
        # The first of the best, as argmax says it: a CPU takes twice as long over pairs of value and place.
        return jnp.min(jnp.where(score_G == jnp.max(score_G), number_G, len(number_G) - 1))

    return jax.lax.map(nearest, x_TxC, batch_size=COMPARED)


def centroid_ids(x_TxC: np.ndarray, centroids_GxC: np.ndarray) -> np.ndarray:
    """:func:`nearest_centroid` of any number of vectors on the host, int32 [T], in batches of one compiled shape."""
    size = min(BATCH, len(x_TxC))
    out = np.empty(len(x_TxC), np.int32)
    for first in range(0, len(x_TxC), size):
        first = min(first, len(x_TxC) - size)  # the last batch overlaps the one before it
        out[first : first + size] = nearest_centroid(x_TxC[first : first + size], centroids_GxC)
    return out


def kmeans(x_TxC: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Centroids float32 [count, C] by Lloyd's rounds from random vectors; one that lost all its own starts again.

    Args:
      x_TxC: float32, at least ``count`` vectors.
      count: G.
      rng: of the draws.
    """
    centroids_GxC = x_TxC[rng.choice(len(x_TxC), count, replace=False)].copy()
    for _ in range(ROUNDS):
        id_T = centroid_ids(x_TxC, centroids_GxC)
        order = np.argsort(id_T, kind="stable")
        used, starts = np.unique(id_T[order], return_index=True)
        sums = np.add.reduceat(x_TxC[order], starts, axis=0)
        centroids_GxC[used] = sums / np.diff([*starts, len(order)])[:, None]
        lost = np.setdiff1d(np.arange(count), used)
        centroids_GxC[lost] = x_TxC[rng.choice(len(x_TxC), len(lost), replace=False)]
    return centroids_GxC
