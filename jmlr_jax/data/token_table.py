"""Rows of tokens of different lengths in two flat, memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jmlr_jax.data.schema import InputError
from jmlr_jax.files import replacing


@dataclass(frozen=True)
class TokenTable:
    """``ids`` int32 [tokens] and ``offsets`` int64 [rows + 1]: row ``i`` is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> TokenTable:
        """A table of the given rows."""
        arrays = [np.asarray(row, np.int32) for row in rows]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(row) for row in arrays], out=offsets[1:])
        return cls(np.concatenate([np.zeros(0, np.int32), *arrays]), offsets)

    @classmethod
    def open(cls, directory: Path, name: str) -> TokenTable:
        """Maps a saved table into memory; raises FileNotFoundError if it is not there."""
        offsets = np.load(directory / f"{name}.offsets.npy", mmap_mode="r")
        path = directory / f"{name}.ids.npy"
        ids = np.load(path, mmap_mode="r") if offsets[-1] else np.load(path)  # an empty file cannot be mapped
        return cls(ids, offsets)

    def save(self, directory: Path, name: str) -> None:
        """Writes ``NAME.ids.npy`` and ``NAME.offsets.npy``; each appears whole or not at all, offsets last."""
        save_array(directory / f"{name}.ids.npy", self.ids)
        save_array(directory / f"{name}.offsets.npy", self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """One row, int32 [length]."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def padded(self, rows: np.ndarray, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as a rectangle, filled on the right.

        Args:
            rows: int [...], row numbers; -1 gives a row of padding with length 0.
            length: width of the result.
            pad_id: the filling.

        Returns:
            int32 ids [..., length] and int32 lengths [...].

        Raises:
            InputError: if a row is longer than ``length``: rows were cut when the table was made, not here.
            IndexError: if a row number is outside the table.
        """
        rows = np.asarray(rows)
        if rows.size and (rows.max() >= len(self) or rows.min() < -1):
            raise IndexError(f"rows from {rows.min()} to {rows.max()} in a table of {len(self)}")
        begin = self.offsets[rows]  # -1 reads the last offset, where nothing begins
        lengths = np.where(rows >= 0, self.offsets[np.minimum(rows + 1, len(self))] - begin, 0)
        if lengths.size and lengths.max() > length:
            raise InputError(f"a row of {lengths.max()} tokens in a table opened at {length}: run `jmlr prepare` again")
        column = np.arange(length)
        present = column < lengths[..., None]
        ids = np.full(present.shape, pad_id, np.int32)
        ids[present] = self.ids[(begin[..., None] + column)[present]]
        return ids, lengths.astype(np.int32)


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file that appears whole or not at all."""
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)
