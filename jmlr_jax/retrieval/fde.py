"""One fixed-dimensional vector per question or passage whose inner product estimates MaxSim (MUVERA, arXiv 2405.19504).

Letters: R repetitions, H SimHash bits, S = 2^H partitions, C token-vector width, W projected width,
E = R * S * W width before the final projection, F width after it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.config import IndexConfig

SIGNS = np.array([-1, 1], np.float32)
FAR = 1 << 20  # Hamming distance of a masked token: further than any real one


class FDEParams(NamedTuple):
    """The random draws; saved with an index, so that a library's generator may change without harm.

    Attributes:
      hash_RxCxH: float32 Gaussian directions, one SimHash bit each.
      project_RxCxW: float32 signs / sqrt(W), or the identity where W is C.
      order_GxF: int32 in [0, E]; output f adds up the entries order[:, f]. E stands for a zero.
      sign_GxF: float32, -1 or 1.
    """

    hash_RxCxH: np.ndarray
    project_RxCxW: np.ndarray
    order_GxF: np.ndarray
    sign_GxF: np.ndarray


def init_fde(cfg: IndexConfig, dim: int, seed: int) -> FDEParams:
    """Draws the partitions and projections.

    The inner projection is random signs (paper, section 2). The final projection is a count sketch whose buckets
    are equally full: a random signed permutation folded into F columns, the same estimate as a dense sign matrix
    at the price of a gather. A width that is no reduction (``fde_projection`` >= C, ``fde_final`` >= E) projects
    nothing.
    """
    rng = np.random.default_rng(seed)
    repetitions, width = cfg.fde_repetitions, min(cfg.fde_projection, dim)
    hashes = rng.normal(size=(repetitions, dim, cfg.fde_simhash_bits)).astype(np.float32)
    if width < dim:
        project = rng.choice(SIGNS, size=(repetitions, dim, width)) / np.sqrt(np.float32(width))
    else:
        project = np.broadcast_to(np.eye(dim, dtype=np.float32), (repetitions, dim, dim))
    entries = repetitions * 2**cfg.fde_simhash_bits * width
    if cfg.fde_final < entries:
        groups = -(-entries // cfg.fde_final)
        order = rng.permutation(entries)
        order = np.concatenate([order, np.full(groups * cfg.fde_final - entries, entries)])
        sign = rng.choice(SIGNS, size=order.shape)
    else:
        groups, order, sign = 1, np.arange(entries), np.ones(entries, np.float32)
    return FDEParams(
        hashes, np.ascontiguousarray(project), order.astype(np.int32).reshape(groups, -1), sign.reshape(groups, -1)
    )


def _partition(tokens_NxTxC: Array, hash_CxH: Array) -> Array:
    """SimHash bucket of every token, int32 [N, T] in [0, 2^H); bit j is the side of hyperplane j."""
    side = jnp.einsum("ntc,ch->nth", tokens_NxTxC, hash_CxH, precision=jax.lax.Precision.HIGHEST) > 0
    return jnp.sum(side << jnp.arange(hash_CxH.shape[1]), axis=-1)


def _fold(params: FDEParams, blocks_RxNxSxW: Array) -> Array:
    """Concatenated blocks [N, E] through the final projection, [N, F]."""
    repetitions, n = blocks_RxNxSxW.shape[:2]
    entries_NxE = jnp.moveaxis(blocks_RxNxSxW, 0, 1).reshape(n, -1)
    padded = jnp.pad(entries_NxE, ((0, 0), (0, 1)))
    return jnp.sum(padded[:, params.order_GxF] * params.sign_GxF, axis=1)


@jax.jit
def query_fde(params: FDEParams, q_NxQxC: Array) -> Array:
    """Encodings of questions: in every partition the sum of its tokens, float32 [N, F].

    Divided by R, so that the inner product with a passage's encoding estimates MaxSim itself.
    """
    q_NxQxC = q_NxQxC.astype(jnp.float32)
    partitions = 2 ** params.hash_RxCxH.shape[-1]

    def repetition(draw: tuple[Array, Array]) -> Array:
        hash_CxH, project_CxW = draw
        member_NxQxS = jax.nn.one_hot(_partition(q_NxQxC, hash_CxH), partitions)
        return jnp.einsum("nqs,nqc,cw->nsw", member_NxQxS, q_NxQxC, project_CxW, precision=jax.lax.Precision.HIGHEST)

    blocks_RxNxSxW = jax.lax.map(repetition, (params.hash_RxCxH, params.project_RxCxW))
    return _fold(params, blocks_RxNxSxW) / len(params.hash_RxCxH)


@jax.jit
def passage_fde(params: FDEParams, p_NxPxC: Array, keep_NxP: Array) -> Array:
    """Encodings of passages: in every partition the mean of its kept tokens, float32 [N, F].

    An empty partition takes the kept token whose SimHash differs from it in the fewest bits (the first such);
    a passage without kept tokens is all zeros.
    """
    p_NxPxC = jnp.where(keep_NxP[..., None], p_NxPxC.astype(jnp.float32), 0.0)
    partitions = 2 ** params.hash_RxCxH.shape[-1]
    partition_S = jnp.arange(partitions)

    def repetition(draw: tuple[Array, Array]) -> Array:
        hash_CxH, project_CxW = draw
        bucket_NxP = _partition(p_NxPxC, hash_CxH)
        member_NxPxS = jax.nn.one_hot(bucket_NxP, partitions) * keep_NxP[..., None]
        projected_NxPxW = jnp.einsum("npc,cw->npw", p_NxPxC, project_CxW, precision=jax.lax.Precision.HIGHEST)
        count_NxSx1 = jnp.sum(member_NxPxS, axis=1)[..., None]
        sum_NxSxW = jnp.einsum("nps,npw->nsw", member_NxPxS, projected_NxPxW, precision=jax.lax.Precision.HIGHEST)
        bits_NxPxS = jax.lax.population_count(bucket_NxP[..., None] ^ partition_S)
        nearest_NxS = jnp.argmin(jnp.where(keep_NxP[..., None], bits_NxPxS, FAR), axis=1)
        filler_NxSxW = jnp.take_along_axis(projected_NxPxW, nearest_NxS[..., None], axis=1)
        return jnp.where(count_NxSx1 > 0, sum_NxSxW / jnp.maximum(count_NxSx1, 1), filler_NxSxW)

    return _fold(params, jax.lax.map(repetition, (params.hash_RxCxH, params.project_RxCxW)))
