"""Token vectors of a corpus as an index keeps them: flat, coded or float16, memory-mapped, scored where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.retrieval.code import TokenCode, encode_tokens, similarity
from jmlr_jax.retrieval.vectors import TokenVectors
from jmlr_jax.scoring import MASKED_SIMILARITY

ENCODE_BATCH = 8192  # tokens coded at once
WIDTH_STEP = 32  # gathered passages are as wide as their longest, rounded up to this: few shapes to compile
QUERY_STEP = 8  # the same for question tokens
BATCHES = (1, 8, 64)  # questions scored at once are padded to one of these


class TokenStore:
    """Kept tokens of the passages, one after the other.

    Attributes:
      code: how they are coded; None: float16 vectors.
      arrays: ``cell`` uint16 [T], ``packed`` uint8 [T, E] and ``gain`` uint8 [T]; without a code ``vectors``
        float16 [T, C]. Memory-mapped if loaded.
      offsets: int64 [N + 1]; passage i has the tokens offsets[i] to offsets[i + 1].
    """

    def __init__(self, code: TokenCode | None, arrays: Mapping[str, np.ndarray], offsets: np.ndarray):
        self.code, self.arrays, self.offsets = code, dict(arrays), np.asarray(offsets)
        self.longest = int(np.diff(self.offsets).max(initial=1))

    @classmethod
    def of(
        cls, pieces: Iterable[TokenVectors], code: TokenCode | None, device_code: TokenCode | None = None
    ) -> TokenStore:
        """Codes the passages of all pieces, in order; one piece at a time is held uncoded.

        ``device_code`` is the code on the device, if the caller has put it there.
        """
        lengths: list[np.ndarray] = []
        parts: list[dict[str, np.ndarray]] = []
        for piece in pieces:
            lengths.append(piece.keep_NxP.sum(1))
            tokens_TxC = piece.vectors_NxPxC[piece.keep_NxP]
            parts.append({"vectors": tokens_TxC} if code is None else _coded(device_code or code, tokens_TxC))
        offsets = np.zeros(1 + sum(map(len, lengths)), np.int64)
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return cls(code, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def gather(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Tokens of passages ``rows`` (int [...]) as arrays [..., P, ...], and their lengths int32 [...].

        P is the longest of them, rounded up; beyond a passage's length stands something that means nothing.
        """
        starts = self.offsets[rows]
        lengths = (self.offsets[rows + 1] - starts).astype(np.int32)
        width = -(-max(1, int(lengths.max(initial=1))) // WIDTH_STEP) * WIDTH_STEP
        at = np.minimum(starts[..., None] + np.arange(width), max(0, int(self.offsets[-1]) - 1))
        return {name: array[at] for name, array in self.arrays.items()}, lengths

    def save(self, directory: Path) -> None:
        """Writes ``offsets.npy`` and a file for each array into an existing directory."""
        for name, array in {"offsets": self.offsets, **self.arrays}.items():
            np.save(directory / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, code: TokenCode | None) -> TokenStore:
        """Maps what :meth:`save` wrote into memory.

        Raises:
          ValueError: the arrays do not belong together.
        """
        offsets = np.load(directory / "offsets.npy", allow_pickle=False)
        names = ("vectors",) if code is None else ("cell", "packed", "gain")
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        for name, array in arrays.items():
            if len(array) != offsets[-1]:
                raise ValueError(f"{name}.npy holds {len(array)} tokens, offsets.npy speaks of {offsets[-1]}")
        return cls(code, arrays, offsets)


def trimmed(q_NxQxC: np.ndarray) -> np.ndarray:
    """Questions float32 without the columns in which none has a token, but for rounding up to :data:`QUERY_STEP`."""
    used = np.flatnonzero(np.any(q_NxQxC != 0, axis=(0, 2)))
    tokens = int(used[-1]) + 1 if len(used) else 1
    return np.asarray(q_NxQxC[:, : -(-tokens // QUERY_STEP) * QUERY_STEP], np.float32)


def padded(q_NxQxC: np.ndarray) -> np.ndarray:
    """Questions filled up with zeros to the next of :data:`BATCHES`; there are no more than the last of them."""
    size = next(size for size in BATCHES if size >= len(q_NxQxC))
    return np.pad(q_NxQxC, ((0, size - len(q_NxQxC)), (0, 0), (0, 0)))


@jax.jit
def score_tokens(code: TokenCode | None, q_BxQxC: Array, tokens: dict[str, Array], length_BxH: Array) -> Array:
    """MaxSim of stored passages, float32 [B, H]; a passage without tokens scores far below all others.

    Args:
      code: of the store.
      q_BxQxC: questions; absent tokens are zero vectors.
      tokens, length_BxH: from :meth:`TokenStore.gather`, [B, H, P, ...].
    """

    def one(args: tuple[Array, dict[str, Array], Array]) -> Array:
        q_QxC, of, length_H = args
        if code is None:
            found_HxPxQ = jnp.einsum(
                "hpc,qc->hpq", of["vectors"].astype(jnp.float32), q_QxC, precision=jax.lax.Precision.HIGHEST
            )
        else:
            found_HxPxQ = similarity(code, q_QxC, of["cell"], of["packed"], of["gain"])
        real_HxP = jnp.arange(found_HxPxQ.shape[1]) < length_H[:, None]
        return jnp.sum(jnp.max(jnp.where(real_HxP[..., None], found_HxPxQ, MASKED_SIMILARITY), axis=1), axis=-1)

    return jax.lax.map(one, (q_BxQxC, tokens, length_BxH))  # one question at a time bounds memory


def _coded(code: TokenCode, tokens_TxC: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of tokens, in batches of one compiled shape."""
    total = len(tokens_TxC)
    out: dict[str, np.ndarray] = {
        "cell": np.empty(total, np.uint16),
        "packed": np.empty((total, code.residual_bytes), np.uint8),
        "gain": np.empty(total, np.uint8),
    }
    for first in range(0, total, ENCODE_BATCH):
        batch = tokens_TxC[first : first + ENCODE_BATCH]
        full = np.pad(batch, ((0, ENCODE_BATCH - len(batch)), (0, 0)))
        for name, found in zip(out, encode_tokens(code, full), strict=True):
            out[name][first : first + len(batch)] = np.asarray(found)[: len(batch)]
    return out


def best_of(row_NxH: np.ndarray, score_NxH: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best-scored rows, best first, equal scores in row order; rows -1 do not count.

    Returns:
      rows int32 [N, k], -1 where there is no further one, and scores float32 [N, k], -inf there.

    >>> best_of(np.array([[7, 3, -1, 5]]), np.array([[1.0, 2.0, 9.0, 1.0]]), 2)
    (array([[3, 5]], dtype=int32), array([[2., 1.]], dtype=float32))
    """
    score_NxH = np.where(row_NxH >= 0, score_NxH, -np.inf)
    order = np.lexsort((row_NxH, -score_NxH))[:, :k]
    row = np.take_along_axis(row_NxH, order, 1)
    score = np.take_along_axis(score_NxH, order, 1)
    short = k - row.shape[1]
    if short > 0:
        row = np.pad(row, ((0, 0), (0, short)), constant_values=-1)
        score = np.pad(score, ((0, 0), (0, short)), constant_values=-np.inf)
    return np.where(np.isneginf(score), -1, row).astype(np.int32), score.astype(np.float32)
