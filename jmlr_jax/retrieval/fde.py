"""One fixed-dimensional vector per question or passage whose inner product estimates MaxSim.

The idea is MUVERA's (arXiv 2405.19504): space is cut into partitions; a question adds up its tokens in each, a passage
has one value in each, and products of these add up to an estimate of MaxSim. How it is cut and valued differs, each for
what it measures (docs/benchmarks.md):

- Partitions are clusters of this corpus's tokens, one set of them, not cells between many sets of random hyperplanes.
- A passage's value in a partition is the whole token that answers the partition's centroid best, as in MaxSim, not a
  projected mean of those that lie there. The centroid stands for the question tokens around it.
- Tokens are taken less their mean, which changes the order of no passages. Modern encoders give vectors with a large
  common part: partitions would be cut along what all tokens share, and values would be rounded with it.

Letters: S partitions, C token-vector width, F = S * C width of an encoding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.retrieval.kmeans import kmeans, nearest_centroid

TOKENS_PER_PARTITION = 256  # of the sample that k-means is fed
AT_ONCE = 16  # passages encoded together: products that fit a CPU's cache


class FDE(NamedTuple):
    """What an encoding was learned as; saved with an index.

    Attributes:
      mean_C: float32, of passages' tokens.
      centroids_SxC: float32, of passages' tokens less their mean.
    """

    mean_C: np.ndarray
    centroids_SxC: np.ndarray

    @property
    def width(self) -> int:
        """F."""
        return self.centroids_SxC.size


def fit_fde(tokens_TxC: np.ndarray, partitions: int, seed: int) -> FDE:
    """Learns mean and partitions from sampled passages' tokens, of which there is one at least; float16 or float32.

    No more partitions are made than there are tokens.
    """
    rng = np.random.default_rng(seed)
    mean_C = tokens_TxC.mean(0, dtype=np.float32)
    partitions = min(partitions, len(tokens_TxC))
    if len(tokens_TxC) > partitions * TOKENS_PER_PARTITION:
        tokens_TxC = tokens_TxC[rng.choice(len(tokens_TxC), partitions * TOKENS_PER_PARTITION, replace=False)]
    return FDE(mean_C, kmeans(tokens_TxC.astype(np.float32) - mean_C, partitions, rng))


@jax.jit
def query_fde(fde: FDE, q_NxQxC: Array) -> Array:
    """Encodings of questions: in every partition the sum of the tokens whose nearest centroid is its own; [N, F].

    The product with a passage's encoding estimates MaxSim less the products of the question's tokens with the passages'
    mean, which are the same for all passages. Absent tokens are zero vectors and add nothing. float32.
    """
    q_NxQxC = q_NxQxC.astype(jnp.float32)
    n, _, dim = q_NxQxC.shape
    id_NxQ = nearest_centroid((q_NxQxC - fde.mean_C).reshape(-1, dim), fde.centroids_SxC).reshape(n, -1)
    member_NxQxS = jax.nn.one_hot(id_NxQ, len(fde.centroids_SxC))
    sum_NxSxC = jnp.einsum("nqs,nqc->nsc", member_NxQxS, q_NxQxC, precision=jax.lax.Precision.HIGHEST)
    return sum_NxSxC.reshape(n, -1)


@jax.jit
def passage_fde(fde: FDE, p_NxPxC: Array, keep_NxP: Array) -> Array:
    """Encodings of passages: in every partition the kept token of the largest product with its centroid; [N, F].

    Of equal products the first. A passage without kept tokens is all zeros. float32.
    """

    def one(passage: tuple[Array, Array]) -> Array:
        p_PxC, keep_Px1 = passage[0].astype(jnp.float32) - fde.mean_C, passage[1][:, None]
        product_PxS = jnp.where(keep_Px1, p_PxC @ jnp.asarray(fde.centroids_SxC).T, -jnp.inf)
        return jnp.where(keep_Px1, p_PxC, 0.0)[jnp.argmax(product_PxS, axis=0)].ravel()

    return jax.lax.map(one, (p_NxPxC, keep_NxP), batch_size=AT_ONCE)
