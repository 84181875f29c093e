"""Token vectors of a corpus on the host, and what every index over them offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TokenVectors:
    """One L2-normalised vector per passage token; arrays may be memory-mapped.

    Attributes:
      vectors_NxPxC: float16. Cosines keep about three decimals, at half the bytes of float32.
      keep_NxP: bool, False where a token takes no part in MaxSim (padding, punctuation).
    """

    vectors_NxPxC: np.ndarray
    keep_NxP: np.ndarray

    def __post_init__(self) -> None:
        v, keep = self.vectors_NxPxC, self.keep_NxP
        if v.ndim != 3 or v.dtype != np.float16 or keep.dtype != np.bool_ or keep.shape != v.shape[:2]:
            raise ValueError(
                f"token vectors must be float16 [N, P, C] with a bool mask [N, P]; "
                f"got {v.dtype} {list(v.shape)} and {keep.dtype} {list(keep.shape)}"
            )
        if len(v) == 0:
            raise ValueError("no passages: encode a corpus of at least one passage")

    def __len__(self) -> int:
        return len(self.keep_NxP)

    def rows(self, which: slice | np.ndarray) -> TokenVectors:
        """Some of the passages; a slice shares memory."""
        return TokenVectors(self.vectors_NxPxC[which], self.keep_NxP[which])


# Rows of a corpus, int64 [n] and in any order -> their vectors in that order, in pieces.
EncodeRows = Callable[[np.ndarray], Iterable[TokenVectors]]


class Searcher(Protocol):
    """Anything that returns the best passages for encoded questions."""

    def search(self, q_NxQxC: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each question by MaxSim.

        Args:
          q_NxQxC: float; absent query tokens are zero vectors, which add nothing to MaxSim.
          k: at least 1; may exceed the corpus.
          allowed_N: bool over the rows of the corpus, which of them may be returned; None: all.

        Returns:
          rows int32 [N, k], best first, -1 where there is no further passage, and MaxSim float32 [N, k], -inf there.
        """
        ...


def check_queries(q_NxQxC: np.ndarray, dim: int, k: int) -> None:
    """Raises ValueError for queries of another width than the index, or k below 1."""
    if q_NxQxC.ndim != 3 or q_NxQxC.shape[-1] != dim:
        raise ValueError(f"queries must be [N, Q, {dim}] for this index; got {list(q_NxQxC.shape)}")
    if k < 1:
        raise ValueError(f"k={k}: ask for at least one passage")


def check_allowed(allowed_N: np.ndarray | None, rows: int) -> None:
    """Raises ValueError for a mask that is not bool [rows]."""
    if allowed_N is not None and (allowed_N.dtype != np.bool_ or allowed_N.shape != (rows,)):
        raise ValueError(f"the mask of allowed rows must be bool [{rows}]; got {allowed_N.dtype} {allowed_N.shape}")


def drawn_rows(count: int, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of ``count`` rows, drawn without replacement, in order, int64.

    >>> drawn_rows(3, 5, 0)
    array([0, 1, 2])
    """
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
