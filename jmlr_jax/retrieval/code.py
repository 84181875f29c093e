"""Token vectors in a few bits a dimension: the mean of all, the nearest centroid, and a residual along its components.

Letters: G centroids, C width of a vector, E bytes of a residual code, T tokens, H hits of a question.

A token is ``mean + gain * (centroid[id] + scale[id] * rotate @ (level * step))``. Levels are small integers: 8, 4, 3,
2, 1 or 0 bits each, more for principal components along which residuals spread more, so that the squared error is least
for the bytes spent (reverse water-filling). What all tokens have in common is kept once and exactly: vectors of modern
encoders are mostly that, and rounding it would drown what tells them apart. Scoring rotates the question once and never
builds the vectors (:func:`similarity`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.retrieval.kmeans import centroid_ids, kmeans, nearest_centroid

# Of a unit Gaussian cut into 2^b equal steps: the step of least squared error, and that error (Max, 1960).
STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
ERROR = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.0001}
GROUP = 8  # components that have the same number of bits: whole bytes at every width
TOKENS_PER_CENTROID = 40  # of the sample that k-means is fed


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean_C", "centroids_GxC", "scale_G", "rotate_CxC", "step_C"],
    meta_fields=["widths"],
)
@dataclass(frozen=True)
class TokenCode:
    """What was learned from a sample of tokens; arrays float32.

    Attributes:
      mean_C: of the sample.
      centroids_GxC: of vectors less the mean; at most 65,536.
      scale_G: root mean square of a residual's entries, for each centroid.
      rotate_CxC: orthogonal; columns are principal components of residuals, those with most bits first.
      step_C: width of a level, in units of ``scale``.
      widths: ``((bits, components), ...)`` with falling bits; components add up to C, those of 0 bits are not stored.
    """

    mean_C: np.ndarray
    centroids_GxC: np.ndarray
    scale_G: np.ndarray
    rotate_CxC: np.ndarray
    step_C: np.ndarray
    widths: tuple[tuple[int, int], ...] = field(default=())

    @property
    def residual_bytes(self) -> int:
        """E, bytes of a residual code."""
        return sum(bits * count for bits, count in self.widths) // 8


def bit_widths(variance_C: np.ndarray, budget: int) -> tuple[tuple[int, int], ...]:
    """Bits for components of falling variance, whole groups of :data:`GROUP`, ``budget`` bits in all at most.

    >>> bit_widths(np.array([16.0] * 8 + [1.0] * 8 + [0.001] * 8), 48)
    ((4, 8), (2, 8), (0, 8))
    """
    variance = variance_C.reshape(-1, GROUP).sum(1)
    bits, order = [0] * len(variance), tuple(ERROR)
    while True:
        best: tuple[float, int, int] | None = None
        for group, have in enumerate(bits):
            if have == order[-1]:
                continue
            more = order[order.index(have) + 1]
            if (more - have) * GROUP <= budget:
                gain = variance[group] * (ERROR[have] - ERROR[more]) / (more - have)
                if best is None or gain > best[0]:
                    best = gain, group, more
        if best is None:
            break
        _, group, more = best
        budget -= (more - bits[group]) * GROUP
        bits[group] = more
    bits.sort(reverse=True)  # variance falls, so this changes nothing but ties
    return tuple((b, GROUP * bits.count(b)) for b in sorted(set(bits), reverse=True))


def centroid_count(tokens: int, sample: int) -> int:
    """G for a corpus of so many tokens: a power of two near 4 sqrt(T), at most 65,536 and what the sample can feed.

    >>> centroid_count(4_000_000, 1_000_000)
    8192
    >>> centroid_count(4_000_000, 3_000)
    64
    """
    wanted = 2 ** round(math.log2(max(2.0, 4 * math.sqrt(tokens))))
    return int(max(1, min(wanted, 65_536, 2 ** int(math.log2(max(1, sample // TOKENS_PER_CENTROID))))))


def fit_code(sample_TxC: np.ndarray, bits: float, tokens: int, seed: int) -> TokenCode:
    """Learns a code of ``bits`` a dimension from a sample of a corpus of ``tokens`` tokens.

    Raises:
      ValueError: C is no multiple of 8, or there is no token.
    """
    if sample_TxC.ndim != 2 or sample_TxC.shape[1] % GROUP or not len(sample_TxC):
        raise ValueError(
            f"a token code needs vectors of a width that is a multiple of {GROUP}; got {list(sample_TxC.shape)}; "
            "set index.bits=16 to store them as they are"
        )
    sample_TxC = sample_TxC.astype(np.float32)
    mean_C = sample_TxC.mean(0)
    sample_TxC -= mean_C
    rng = np.random.default_rng(seed)
    count = centroid_count(tokens, len(sample_TxC))
    fed = sample_TxC
    if len(fed) > count * TOKENS_PER_CENTROID:
        fed = fed[rng.choice(len(fed), count * TOKENS_PER_CENTROID, replace=False)]
    # As they are kept on disk.
    centroids_GxC = kmeans(fed, count, rng).astype(np.float16).astype(np.float32)
    id_T = centroid_ids(fed, centroids_GxC)
    residual_TxC = fed - centroids_GxC[id_T]
    energy_G = np.bincount(id_T, (residual_TxC**2).sum(1), count)
    tokens_G = np.bincount(id_T, minlength=count)
    dim = fed.shape[1]
    # A centroid with few tokens of its own leans on the mean of all.
    typical = energy_G.sum() / max(1, int(tokens_G.sum()))
    scale_G = np.sqrt(np.maximum((energy_G + typical) / (tokens_G + 1) / dim, 1e-8)).astype(np.float32)
    scaled_TxC = residual_TxC / scale_G[id_T, None]
    _, components = np.linalg.eigh((scaled_TxC.T @ scaled_TxC / len(scaled_TxC)).astype(np.float64))
    rotate_CxC = np.ascontiguousarray(components[:, ::-1]).astype(np.float32)
    deviation_C = (scaled_TxC @ rotate_CxC).std(0) + 1e-9
    widths = bit_widths(deviation_C**2, int(bits * dim))
    factor_C = np.concatenate([np.full(n, STEP.get(b, 0.0)) for b, n in widths])
    step_C = (deviation_C * factor_C).astype(np.float32)
    return TokenCode(mean_C, centroids_GxC, scale_G, rotate_CxC, step_C, widths)


@jax.jit
def encode_tokens(code: TokenCode, x_TxC: Array) -> tuple[Array, Array, Array]:
    """Codes of vectors: centroid id uint16 [T], residual code uint8 [T, E], gain uint8 [T].

    The gain gives what is coded, the vector less the mean, its length back: rounding to levels shortens vectors, by a
    different amount each, which would change the order of passages. It is stored as :func:`gain_of` reads it.
    """
    x_TxC = x_TxC.astype(jnp.float32) - code.mean_C
    id_T = nearest_centroid(x_TxC, code.centroids_GxC)
    scale_Tx1 = jnp.asarray(code.scale_G)[id_T][:, None]
    residual_TxC = (x_TxC - jnp.asarray(code.centroids_GxC)[id_T]) / scale_Tx1
    turned_TxC = jnp.matmul(residual_TxC, code.rotate_CxC, precision=jax.lax.Precision.HIGHEST)
    at, packed, levels = 0, [], []
    for bits, count in code.widths:
        part = turned_TxC[:, at : at + count]
        if bits:
            level = jnp.floor(part / code.step_C[at : at + count]) + 2 ** (bits - 1)
            level = jnp.clip(level, 0, 2**bits - 1).astype(jnp.uint8)
            packed.append(_pack(level, bits))
            levels.append(_centred(level, bits))
        else:
            levels.append(jnp.zeros_like(part))
        at += count
    found = jnp.concatenate(levels, 1) * code.step_C
    turned_centroids = jnp.matmul(code.centroids_GxC, code.rotate_CxC, precision=jax.lax.Precision.HIGHEST)
    length_T = jnp.linalg.norm(turned_centroids[id_T] + scale_Tx1 * found, axis=1)
    gain_T = jnp.linalg.norm(x_TxC, axis=1) / jnp.maximum(length_T, 1e-6)
    gain_T = jnp.clip(jnp.round((gain_T - 0.8) * 400), 0, 255).astype(jnp.uint8)
    bytes_TxE = jnp.concatenate(packed, 1) if packed else jnp.zeros((len(x_TxC), 0), jnp.uint8)
    return id_T.astype(jnp.uint16), bytes_TxE, gain_T


class Asked(NamedTuple):
    """What of a question meets coded tokens; made once, whatever it is compared with.

    Attributes:
      mean_Q: float32, products with the mean.
      centroid_GxQ: float32, products with all centroids.
      turned_QxC: float32, along the components of residuals, in steps of their levels.
    """

    mean_Q: Array
    centroid_GxQ: Array
    turned_QxC: Array


def asked(code: TokenCode, q_QxC: Array) -> Asked:
    """A question's tokens, made ready for :func:`similarity`."""
    q_QxC, product = q_QxC.astype(jnp.float32), partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    turned_QxC = product(q_QxC, code.rotate_CxC) * code.step_C
    return Asked(product(q_QxC, code.mean_C), product(code.centroids_GxC, q_QxC.T), turned_QxC)


def similarity(code: TokenCode, question: Asked, tokens: Mapping[str, Array]) -> Array:
    """Products of question tokens with coded tokens, float32 [..., Q].

    Args:
      code: of the tokens.
      question: from :func:`asked`.
      tokens: ``centroid`` (ids) [...], ``residual`` (codes) [..., E] and ``gain`` [...]; of ``centroid`` alone,
        products with mean and centroid.
    """
    found = question.centroid_GxQ[tokens["centroid"]]
    if "residual" not in tokens:
        return found + question.mean_Q
    residual: Array | float = 0.0
    at = kept = 0
    # A product for each width, of levels as they are packed: joining or centring them first takes five times as long.
    for bits, count in code.widths:
        if bits:
            size = bits * count // 8
            level = _unpack(tokens["residual"][..., at : at + size], bits).astype(jnp.float32)
            part_QxC = question.turned_QxC[:, kept : kept + count]
            residual += jnp.einsum("...c,qc->...q", level, part_QxC, precision=jax.lax.Precision.HIGHEST)
            residual -= (2**bits - 1) / 2 * jnp.sum(part_QxC, 1)
            at, kept = at + size, kept + count
    found += jnp.asarray(code.scale_G)[tokens["centroid"]][..., None] * residual
    return found * gain_of(tokens["gain"])[..., None] + question.mean_Q


def gain_of(gain: Array) -> Array:
    """Factors from 0.8 to 1.44 that the bytes stand for, float32."""
    return 0.8 + gain.astype(jnp.float32) / 400


def _centred(level: Array, bits: int) -> Array:
    """Middles of the levels around zero, in steps: 0 .. 2^b - 1 becomes -(2^b - 1)/2 .. (2^b - 1)/2."""
    return level.astype(jnp.float32) - (2**bits - 1) / 2


def _pack(level: Array, bits: int) -> Array:
    """Levels [T, n] into bytes [T, n * bits / 8]; byte i holds entries i, i + n/per, ... from its low end.

    Three bits are the lower two of every entry, then the upper one of every entry.
    """
    if bits == 3:
        return jnp.concatenate([_pack(level & 3, 2), _pack(level >> 2, 1)], axis=1)
    per = 8 // bits
    blocks = jnp.split(level, per, axis=1)
    packed = blocks[0]
    for place, block in enumerate(blocks[1:], 1):
        packed = packed | (block << (bits * place))
    return packed


def _unpack(packed: Array, bits: int) -> Array:
    """Inverse of :func:`_pack` on the last axis."""
    if bits == 3:
        lower = packed.shape[-1] * 2 // 3
        return _unpack(packed[..., :lower], 2) | (_unpack(packed[..., lower:], 1) << 2)
    shifts, mask = [bits * place for place in range(8 // bits)], 2**bits - 1
    if len(shifts) <= 2:
        return jnp.concatenate([(packed >> shift) & mask for shift in shifts], -1)
    # On a CPU, joining four or eight blocks takes longer than this, joining two less.
    blocks = (packed[..., None, :] >> jnp.array(shifts, jnp.uint8)[:, None]) & mask
    return blocks.reshape(*packed.shape[:-1], -1)
