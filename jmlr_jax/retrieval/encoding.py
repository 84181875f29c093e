"""The single vectors that ScaNN searches: fixed-dimensional encodings reduced to their principal components.

Letters as in :mod:`jmlr_jax.retrieval.fde`, and D components. A random projection keeps products up to a noise that
grows as it narrows; the principal components of encodings of sampled passages, an orthogonal basis, keep most of what
tells these passages apart in far fewer numbers (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.retrieval.fde import FDE, passage_fde, query_fde
from jmlr_jax.retrieval.vectors import TokenVectors

BATCH = 1024  # passages encoded at once
SAMPLE = 4096  # passages whose encodings give the components


class Encoding(NamedTuple):
    """How passages and questions become single vectors.

    Attributes:
      fde: the fixed-dimensional encoding.
      mean_F: float32, of sampled passages' encodings.
      basis_FxD: float32, orthonormal columns, principal components in order; of width 0 where nothing is reduced.
    """

    fde: FDE
    mean_F: np.ndarray
    basis_FxD: np.ndarray

    @property
    def width(self) -> int:
        """Of a vector: D, or F where nothing is reduced."""
        return self.basis_FxD.shape[1] or len(self.mean_F)


def plain_encoding(fde: FDE) -> Encoding:
    """The fixed-dimensional encodings as they are."""
    return Encoding(fde, np.zeros(fde.width, np.float32), np.zeros((fde.width, 0), np.float32))


def reduced(encoding: Encoding, sample_NxF: np.ndarray, components: int) -> Encoding:
    """A plain encoding reduced to the principal components of sampled passages' vectors.

    No more components are kept than the sample spans: a corpus that is all in the sample loses nothing but what is the
    same for every passage. The sample is overwritten.
    """
    if components >= sample_NxF.shape[1] or len(sample_NxF) < 2:
        return encoding
    mean_F = sample_NxF.mean(0)
    centred_NxF = np.subtract(sample_NxF, mean_F, out=sample_NxF)  # half a gigabyte is not held twice
    # The small side's products: there are fewer passages than numbers in a vector.
    values, vectors = np.linalg.eigh((centred_NxF @ centred_NxF.T).astype(np.float64))
    keep = min(components, int(np.sum(values > 1e-6 * max(values[-1], 1e-12))))
    if keep < 1:  # all sampled passages are alike
        return encoding
    basis = centred_NxF.T @ (vectors[:, ::-1][:, :keep] / np.sqrt(values[::-1][:keep]))
    basis = np.ascontiguousarray(basis).astype(np.float16).astype(np.float32)  # as it is kept on disk
    return Encoding(encoding.fde, mean_F.astype(np.float32), basis)


@jax.jit
def query_vectors(encoding: Encoding, q_NxQxC: Array) -> Array:
    """Questions as single vectors, float32 [N, D]."""
    fde_NxF = query_fde(encoding.fde, q_NxQxC)
    if not encoding.basis_FxD.shape[1]:
        return fde_NxF
    return jnp.matmul(fde_NxF, encoding.basis_FxD, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _passage_vectors(encoding: Encoding, p_NxPxC: Array, keep_NxP: Array) -> Array:
    fde_NxF = passage_fde(encoding.fde, p_NxPxC, keep_NxP)
    if not encoding.basis_FxD.shape[1]:
        return fde_NxF
    return jnp.matmul(fde_NxF - encoding.mean_F, encoding.basis_FxD, precision=jax.lax.Precision.HIGHEST)


def passage_vectors(encoding: Encoding, block: TokenVectors, size: int = BATCH) -> np.ndarray:
    """Passages as single vectors, float32 [N, D], ``size`` at a time in one compiled shape."""
    size = min(size, BATCH)
    out = np.empty((len(block), encoding.width), np.float32)
    for first in range(0, len(block), size):
        part = block.rows(slice(first, first + size))
        short = size - len(part)
        p = np.pad(part.vectors_NxPxC, ((0, short), (0, 0), (0, 0)))
        made = _passage_vectors(encoding, p, np.pad(part.keep_NxP, ((0, short), (0, 0))))
        out[first : first + size] = np.asarray(made)[: len(part)]
    return out
