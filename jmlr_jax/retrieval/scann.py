"""ScaNN over fixed-dimensional encodings, re-ranked by exact MaxSim on the device."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scann.scann_ops.py import scann_ops_pybind

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.fde import FDEParams, init_fde, passage_fde, query_fde
from jmlr_jax.retrieval.vectors import TokenVectors, check_queries
from jmlr_jax.scoring import maxsim, top

QUERY_BATCH = 8
REORDER = 4  # quantised hits scored again on full vectors, for each hit wanted


@dataclass(frozen=True)
class ScannSettings:
    """How ScaNN searches; leaves None: no tree."""

    leaves: int | None
    leaves_searched: int | None
    quantised: bool  # asymmetric hashing and reordering, or brute force


def settings(passages: int) -> ScannSettings:
    """Settings by corpus size, as ScaNN's authors advise.

    Brute force below 20,000 passages, asymmetric hashing and reordering below 100,000, above that a tree of
    about sqrt(n) leaves in front of them, an eighth of which are searched.

    >>> settings(5_000)
    ScannSettings(leaves=None, leaves_searched=None, quantised=False)
    >>> settings(50_000)
    ScannSettings(leaves=None, leaves_searched=None, quantised=True)
    >>> settings(1_000_000)
    ScannSettings(leaves=1000, leaves_searched=125, quantised=True)
    """
    if passages < 20_000:
        return ScannSettings(None, None, False)
    if passages < 100_000:
        return ScannSettings(None, None, True)
    leaves = round(math.sqrt(passages))
    return ScannSettings(leaves, -(-leaves // 8), True)


def build_searcher(fde_NxF: np.ndarray, hits: int, how: ScannSettings) -> Any:
    """Trains a ScaNN searcher by inner product. Training is not deterministic: save the result."""
    builder = scann_ops_pybind.builder(fde_NxF, hits, "dot_product").set_n_training_threads(os.cpu_count() or 1)
    if how.leaves is not None:
        builder = builder.tree(how.leaves, how.leaves_searched, training_sample_size=len(fde_NxF))
    if how.quantised:
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(REORDER * hits)
    else:
        builder = builder.score_brute_force()
    return builder.build()


def encode_passages_fde(params: FDEParams, vectors: TokenVectors, batch: int) -> np.ndarray:
    """Fixed-dimensional encodings of a corpus, float32 [N, F], ``batch`` passages at a time in one compiled shape."""
    out = np.empty((len(vectors), params.order_GxF.shape[1]), np.float32)
    for first in range(0, len(vectors), batch):
        p, keep = vectors.vectors_NxPxC[first : first + batch], vectors.keep_NxP[first : first + batch]
        short = batch - len(p)
        fde = passage_fde(params, np.pad(p, ((0, short), (0, 0), (0, 0))), np.pad(keep, ((0, short), (0, 0))))
        out[first : first + batch] = np.asarray(fde)[: len(p)]
    return out


@partial(jax.jit, static_argnames="k")
def _rerank(
    q_BxQxC: Array, p_BxHxPxC: Array, keep_BxHxP: Array, valid_BxH: Array, k: int
) -> tuple[Array, Array, Array]:
    """Exact MaxSim of H hits; returns the best k: position among the hits, whether there is one, score."""

    def one(args: tuple[Array, Array, Array]) -> Array:
        q_QxC, p_HxPxC, keep_HxP = args
        return maxsim(q_QxC[None], p_HxPxC.astype(jnp.float32)[None], keep_HxP[None])[0]

    score_BxH = jax.lax.map(one, (q_BxQxC, p_BxHxPxC, keep_BxHxP))  # one question at a time bounds memory
    at_BxK, taken_BxK = top(score_BxH, valid_BxH, k)
    return at_BxK, taken_BxK, jnp.take_along_axis(score_BxH, at_BxK, axis=1)


class ScannIndex:
    """ScaNN's hits on the encodings, re-ranked by exact MaxSim over the token vectors.

    Use :meth:`build` or :meth:`load`.
    """

    kind = "scann"

    def __init__(self, vectors: TokenVectors, params: FDEParams, searcher: Any, rerank: int):
        self.vectors, self.params, self._searcher, self.rerank = vectors, params, searcher, rerank

    @classmethod
    def build(cls, vectors: TokenVectors, cfg: IndexConfig, seed: int, how: ScannSettings | None = None) -> ScannIndex:
        """Encodes the passages and trains the searcher; ``how`` None chooses by corpus size."""
        params = init_fde(cfg, vectors.vectors_NxPxC.shape[-1], seed)
        hits = min(cfg.rerank, len(vectors))
        fde_NxF = encode_passages_fde(params, vectors, min(cfg.encode_batch, len(vectors)))
        searcher = build_searcher(fde_NxF, hits, how or settings(len(vectors)))
        return cls(vectors, params, searcher, cfg.rerank)

    def search(self, q_NxQxC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`jmlr_jax.retrieval.vectors.Searcher`; ``max(rerank, k)`` hits are re-ranked.

        Raises:
          ValueError: width of the queries differs from the index, or k is below 1.
        """
        passages, _, dim = self.vectors.vectors_NxPxC.shape
        check_queries(q_NxQxC, dim, k)
        hits = min(max(self.rerank, k), passages)
        best = min(k, hits)
        rows_NxK = np.full((len(q_NxQxC), k), -1, np.int32)
        score_NxK = np.full((len(q_NxQxC), k), -np.inf, np.float32)
        for first in range(0, len(q_NxQxC), QUERY_BATCH):
            q_BxQxC = np.asarray(q_NxQxC[first : first + QUERY_BATCH], np.float32)
            n = len(q_BxQxC)
            q_BxQxC = np.pad(q_BxQxC, ((0, QUERY_BATCH - n), (0, 0), (0, 0)))
            hit_BxH, similarity_BxH = self._searcher.search_batched_parallel(
                np.asarray(query_fde(self.params, q_BxQxC)),
                final_num_neighbors=hits,
                pre_reorder_num_neighbors=REORDER * hits,
            )
            valid_BxH = ~np.isnan(similarity_BxH)  # a tree search that finds too few pads with row 0 and NaN
            at, taken, score = _rerank(
                q_BxQxC, self.vectors.vectors_NxPxC[hit_BxH], self.vectors.keep_NxP[hit_BxH], valid_BxH, best
            )
            rows = np.take_along_axis(hit_BxH.astype(np.int32), np.asarray(at), axis=1)
            rows_NxK[first : first + n, :best] = np.where(taken, rows, -1)[:n]
            score_NxK[first : first + n, :best] = np.where(taken, score, -np.inf)[:n]
        return rows_NxK, score_NxK

    def save(self, directory: Path) -> None:
        """Writes ``fde.npz`` and ``scann/`` into an existing directory; the token vectors are the store's."""
        np.savez(directory / "fde.npz", **self.params._asdict())
        (directory / "scann").mkdir()
        # Relative asset paths: the directory may be moved as a whole.
        self._searcher.serialize(str((directory / "scann").absolute()), relative_path=True)

    @classmethod
    def load(cls, directory: Path, vectors: TokenVectors, rerank: int) -> ScannIndex:
        """Reads what :meth:`save` wrote."""
        with np.load(directory / "fde.npz", allow_pickle=False) as arrays:
            params = FDEParams(**{name: arrays[name] for name in FDEParams._fields})
        # ScaNN resolves its assets against the path as given: only an absolute one survives a change of directory.
        searcher = scann_ops_pybind.load_searcher(str((directory / "scann").absolute()), assets_backcompat_shim=False)
        return cls(vectors, params, searcher, rerank)
