"""Token vectors of a corpus as an index keeps them: flat, coded or float16, memory-mapped, scored where they lie.

Letters: H hits of a question, R tiles of them. A tile is :data:`TILE` tokens of one passage in a row: passages differ
much in length, and few tiles are partly empty, where most passages padded to the longest would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmlr_jax.method.scoring import MASKED_SIMILARITY
from jmlr_jax.retrieval.code import TokenCode, asked, encode_tokens, similarity
from jmlr_jax.retrieval.vectors import TokenVectors

ENCODE_BATCH = 8192  # tokens coded at once
TILE = 32  # tokens
AT_ONCE = 256  # tiles of a question compared at once
QUERY_STEP = 8  # question tokens are rounded up to a multiple of this
BATCHES = (1, 8, 64)  # questions encoded at once are padded to one of these


class Tiles(NamedTuple):
    """Tokens of the hits of a question, gathered.

    Attributes:
      arrays: of a :class:`TokenStore`, [R, TILE, ...]; beyond a tile's length stands something that means nothing.
      length_R: int32, tokens of a tile; 0 for the filling behind the last.
      owner_R: int32, number of the hit that a tile is of.
    """

    arrays: dict[str, Any]
    length_R: np.ndarray
    owner_R: np.ndarray


class TokenStore:
    """Kept tokens of the passages, one after the other.

    Attributes:
      code: how they are coded; None: float16 vectors.
      arrays: ``centroid`` (ids) uint16 [T], ``residual`` (codes) uint8 [T, E] and ``gain`` uint8 [T]; without a code
        ``vectors`` float16 [T, C]. Memory-mapped if loaded.
      offsets: int64 [N + 1]; passage i has the tokens offsets[i] to offsets[i + 1].
    """

    def __init__(self, code: TokenCode | None, arrays: Mapping[str, np.ndarray], offsets: np.ndarray):
        self.code, self.arrays, self.offsets = code, dict(arrays), np.asarray(offsets)

    @classmethod
    def of(
        cls, pieces: Iterable[TokenVectors], code: TokenCode | None, device_code: TokenCode | None = None
    ) -> TokenStore:
        """Codes the passages of all pieces, in order; one piece at a time is held uncoded.

        ``device_code`` is the code on the device, if the caller has put it there.
        """
        lengths: list[np.ndarray] = []
        arrays: dict[str, np.ndarray] = {}
        for piece in pieces:
            lengths.append(piece.keep_NxP.sum(1))
            tokens_TxC = piece.vectors_NxPxC[piece.keep_NxP]
            found = {"vectors": tokens_TxC} if code is None else _coded(device_code or code, tokens_TxC)
            for name, array in found.items():
                # Grown in place: to join pieces at the end would hold all tokens twice.
                whole = arrays.setdefault(name, np.empty((0, *array.shape[1:]), array.dtype))
                whole.resize((len(whole) + len(array), *array.shape[1:]), refcheck=False)
                whole[len(whole) - len(array) :] = array
        offsets = np.zeros(1 + sum(map(len, lengths)), np.int64)
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return cls(code, arrays, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

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
        names = ("vectors",) if code is None else ("centroid", "residual", "gain")
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        for name, array in arrays.items():
            if len(array) != offsets[-1]:
                raise ValueError(f"{name}.npy holds {len(array)} tokens, offsets.npy speaks of {offsets[-1]}")
        return cls(code, arrays, offsets)


def gather(stores: Sequence[TokenStore], names: Iterable[str], entry_H: np.ndarray) -> Tiles:
    """Tokens of these entries (int; none where -1), numbered through the stores.

    Args:
      stores: of one code.
      names: of the arrays that are wanted.
      entry_H: hits of a question.
    """
    first_S = np.cumsum([0, *map(len, stores)])
    hit_V = np.flatnonzero(entry_H >= 0)
    entry_V = entry_H[hit_V]
    store_V = np.searchsorted(first_S, entry_V, side="right") - 1
    start_V, tokens_V = np.zeros(len(entry_V), np.int64), np.zeros(len(entry_V), np.int64)
    for number, store in enumerate(stores):
        here = np.flatnonzero(store_V == number)
        at = entry_V[here] - first_S[number]
        start_V[here], tokens_V[here] = store.offsets[at], store.offsets[at + 1] - store.offsets[at]
    tiles_V = -(-tokens_V // TILE)
    of_R = np.repeat(np.arange(len(entry_V)), tiles_V)
    inside_R = (np.arange(len(of_R)) - np.repeat(np.cumsum(tiles_V) - tiles_V, tiles_V)) * TILE
    filling = 0, rounded(len(of_R)) - len(of_R)
    length_R = np.pad(np.minimum(TILE, tokens_V[of_R] - inside_R), filling).astype(np.int32)
    owner_R = np.pad(hit_V[of_R], filling).astype(np.int32)
    start_R, store_R = np.pad(start_V[of_R] + inside_R, filling), np.pad(store_V[of_R], filling)
    arrays = {}
    for name in names:
        parts = [store.arrays[name] for store in stores]
        if len(parts) == 1:
            arrays[name] = parts[0][_tokens_of(start_R, parts[0])]
            continue
        arrays[name] = np.zeros((len(start_R), TILE, *parts[0].shape[1:]), parts[0].dtype)
        for number, part in enumerate(parts):
            tiles = store_R == number
            if len(part):
                arrays[name][tiles] = part[_tokens_of(start_R[tiles], part)]
    return Tiles(arrays, length_R, owner_R)


def _tokens_of(start: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Numbers of the tokens of tiles that begin at ``start``, [R, TILE], none beyond the end."""
    return np.minimum(start[:, None] + np.arange(TILE), len(part) - 1)


def rounded(tiles: int) -> int:
    """The next of few numbers of tiles, four in every octave: each is a shape to compile.

    >>> [rounded(n) for n in (1, 9, 11, 1000, 1100)]
    [8, 10, 12, 1024, 1280]
    """
    step = max(2, 2 ** (max(1, tiles - 1).bit_length() - 3))
    return max(8, -(-tiles // step) * step)


def trimmed(q_NxQxC: np.ndarray) -> np.ndarray:
    """Questions float32 without the columns in which none has a token, but for rounding up to :data:`QUERY_STEP`."""
    present = np.flatnonzero(np.any(q_NxQxC != 0, axis=(0, 2)))
    tokens = int(present[-1]) + 1 if present.size else 1
    return np.asarray(q_NxQxC[:, : -(-tokens // QUERY_STEP) * QUERY_STEP], np.float32)


def padded(q_NxQxC: np.ndarray) -> np.ndarray:
    """Questions filled up with zeros to the next of :data:`BATCHES`; there are no more than the last of them."""
    size = next(size for size in BATCHES if size >= len(q_NxQxC))
    return np.pad(q_NxQxC, ((0, size - len(q_NxQxC)), (0, 0), (0, 0)))


@partial(jax.jit, static_argnames="hits")
def score_tokens(code: TokenCode | None, q_QxC: Array, tiles: Tiles, *, hits: int) -> Array:
    """MaxSim of gathered hits, float32 [hits]; a passage without tokens scores far below all others.

    With the array ``centroid`` alone, tokens are taken to be their centroids: 2 bytes a token tell much of a score.
    One question at a time: each has hits of its own, and a gather of eight took twice as long a question on a CPU.

    Args:
      code: of the stores.
      q_QxC: a question; absent tokens are zero vectors.
      tiles: from :func:`gather`.
      hits: H.
    """
    question = None if code is None else asked(code, q_QxC)

    def best(tile: tuple[dict[str, Array], Array]) -> Array:
        of, length = tile
        if code is None or question is None:
            vectors_TxC = of["vectors"].astype(jnp.float32)
            found_TxQ = jnp.matmul(vectors_TxC, q_QxC.T, precision=jax.lax.Precision.HIGHEST)
        else:
            found_TxQ = similarity(code, question, of)
        return jnp.max(jnp.where((jnp.arange(TILE) < length)[:, None], found_TxQ, MASKED_SIMILARITY), axis=0)

    # A few tiles at a time: what is unpacked of them stays in the cache, which makes scoring 2 to 5 times as fast.
    best_RxQ = jax.lax.map(best, (tiles.arrays, tiles.length_R), batch_size=AT_ONCE)
    best_HxQ = jnp.full((hits, q_QxC.shape[0]), MASKED_SIMILARITY).at[tiles.owner_R].max(best_RxQ)
    return jnp.sum(best_HxQ, axis=-1)


def _coded(code: TokenCode, tokens_TxC: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of tokens, in batches of one compiled shape."""
    total = len(tokens_TxC)
    out: dict[str, np.ndarray] = {
        "centroid": np.empty(total, np.uint16),
        "residual": np.empty((total, code.residual_bytes), np.uint8),
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
