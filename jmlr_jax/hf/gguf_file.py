"""The bytes of a GGUF file: its fields, and tensors that are dequantised when their turn comes.

A file is a magic number, a version, two counts, the fields ``(name, type, value)``, the tensors ``(name, shape, type,
offset)``, and the tensors' bytes. Its beginning is read here, not by the library, which keeps an array for every
string (some 0.6 GB for Llama 3's vocabulary) and follows a damaged length to its end. What the library knows and
nobody else needs to know is how each type of block is packed.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from jmlr_jax.files import AnyPath, any_path, check_local
from jmlr_jax.hf.io import Entry, HFError

MAGIC = b"GGUF"
_REMEDY = "download it again"
_PIECE = 16 << 20  # bytes of float32 that are dequantised at once
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_PLAIN = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}  # stored as they are; safetensors has the same names


@dataclass(frozen=True)
class GGUFEntry(Entry):
    """One tensor. `dtype` is what :meth:`read` gives: the stored one, or ``F32`` of what is quantised."""

    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    raised: bool = False  # stored with one added, which read() takes off again
    heads: int = 0  # if not 0, the rows of each of so many heads lie in pairs (e, e + width/2); read() parts them

    def read(self) -> np.ndarray:
        """The tensor, dequantised in pieces, its rows in the order of Hugging Face checkpoints."""
        value = super().read() if self.kind.name in _PLAIN else self._dequantised()
        if self.raised:
            value = np.asarray(value - np.ones((), value.dtype))
        if not self.heads:
            return value
        paired = value.reshape(self.heads, -1, 2, *self.shape[1:])
        return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(self.shape)

    def _dequantised(self) -> np.ndarray:
        """Float32 `shape`; the blocks run along the last axis."""
        columns = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        packed = np.memmap(Path(os.fspath(self.file)), np.uint8, "r", self.start, (rows, self.size // rows))
        whole = np.empty((rows, columns), np.float32)
        step = max(1, _PIECE // (4 * columns))
        for at in range(0, rows, step):
            whole[at : at + step] = gguf.dequantize(packed[at : at + step], self.kind)
        return whole.reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """What a file says: `fields` by name as Python values, `tensors` by the names of the format."""

    path: AnyPath
    fields: dict[str, Any]
    tensors: dict[str, GGUFEntry]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file that begins as GGUF does; its name does not matter."""
    file = any_path(path)
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Fields and tensors of a GGUF file on a local disk, every tensor within the file.

    Raises:
        HFError: the file is truncated, damaged, one part of a model, or of a version, byte order or quantisation that
            is not read here; names it, the field or tensor, and what to do.
        PlaceError: the file is in a bucket.
    """
    file = any_path(check_local(os.fspath(path)))
    if not is_gguf(file):
        raise HFError(f"{file}: not a GGUF file, which would begin with {MAGIC.decode()}; {_REMEDY}")
    with open(os.fspath(file), "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, file)
        tensor_count, fields = _fields(cursor)
        if int(fields.get("split.count", 1)) > 1:
            raise HFError(
                f"{file}: one of the {fields['split.count']} parts of a split model (split.count); join them with "
                "llama.cpp's `llama-gguf-split --merge FIRST_PART OUT.gguf` and import that"
            )
        tensors = _tensors(cursor, tensor_count, fields, len(data))
    return GGUFFile(file, fields, tensors)


class _Cursor:
    """Reads one value after the other; running out of bytes is the file's fault."""

    def __init__(self, data: mmap.mmap, file: AnyPath) -> None:
        self.data, self.file, self.at = data, file, len(MAGIC)

    def _take(self, size: int) -> int:
        """Where the next `size` bytes begin, which are passed."""
        at = self.at
        if at + size > len(self.data):
            raise HFError(
                f"{self.file}: truncated or damaged: {len(self.data)} bytes, its header needs at least {at + size}; "
                f"{_REMEDY}"
            )
        self.at += size
        return at

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """The next `count` numbers of one `struct` format."""
        return struct.unpack_from(f"<{count}{code}", self.data, self._take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        """The next number."""
        return self.numbers(code)[0]

    def text(self) -> str:
        """The next string; bytes that are not UTF-8 are replaced."""
        size = self.number("Q")
        at = self._take(size)
        return self.data[at : at + size].decode(errors="replace")

    def kind(self, what: str) -> GGUFValueType:
        """The next type of a value."""
        number = self.number("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise HFError(f"{self.file}: {what} is of type {number}, which is unknown here; {_REMEDY}") from None

    def value(self, what: str) -> Any:
        """The next typed value: number, bool, string, or list of one of them."""
        kind = self.kind(what)
        if kind is GGUFValueType.STRING:
            return self.text()
        if kind is not GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.kind(what), self.number("Q")
        if inner is GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if inner is GGUFValueType.ARRAY:
            raise HFError(f"{self.file}: {what} is a list of lists, which is not read here")
        return list(self.numbers(_SCALARS[inner], count))


def _fields(cursor: _Cursor) -> tuple[int, dict[str, Any]]:
    """Number of tensors, and the fields."""
    version = cursor.number("I")
    if version and version & 0xFFFF == 0:
        raise HFError(f"{cursor.file}: written in big-endian byte order, which is not read here; get the usual file")
    if version not in (2, 3):
        raise HFError(f"{cursor.file}: GGUF version {version}; read here are 2 and 3: convert the model again")
    tensors, count = cursor.numbers("Q", 2)
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in fields:
            raise HFError(f"{cursor.file}: field {name} is set twice; {_REMEDY}")
        fields[name] = cursor.value(f"field {name}")
    return tensors, fields


def _tensors(cursor: _Cursor, count: int, fields: dict[str, Any], total: int) -> dict[str, GGUFEntry]:
    """Tensors by name, all of whose bytes are there and of a kind that can be read."""
    file = cursor.file
    found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]] = []
    for _ in range(count):
        name = cursor.text()
        shape = tuple(reversed(cursor.numbers("Q", cursor.number("I"))))  # theirs begins with the innermost axis
        number, offset = cursor.number("I"), cursor.number("Q")
        try:
            found.append((name, shape, GGMLQuantizationType(number), offset))
        except ValueError:
            raise HFError(
                f"{file}: {name} is quantised by type {number}, which is unknown here; take a Q8_0 or F16 file"
            ) from None
    if doubled := [name for name, n in Counter(name for name, *_ in found).items() if n > 1]:
        raise HFError(f"{file}: set twice: {', '.join(doubled)}; {_REMEDY}")
    align = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(align, int) or align < 1:
        raise HFError(f"{file}: general.alignment is {align!r}, not a number of bytes; {_REMEDY}")
    first = -(-cursor.at // align) * align
    tensors: dict[str, GGUFEntry] = {}
    unread: dict[GGMLQuantizationType, str] = {}
    for name, shape, kind, offset in found:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or math.prod(shape) == 0 or shape[-1] % block:
            raise HFError(f"{file}: {name} has shape {list(shape)}, which {kind.name} cannot hold; {_REMEDY}")
        size = math.prod(shape) // block * block_bytes
        dtype = kind.name if kind.name in _PLAIN else "F32"
        tensors[name] = GGUFEntry(file, dtype, shape, first + offset, size, kind)
        if not _is_read(kind):
            unread.setdefault(kind, name)
    end = max((entry.start + entry.size for entry in tensors.values()), default=first)
    if end > total:
        raise HFError(f"{file}: truncated: {total} bytes, its header describes {end}; {_REMEDY}")
    if unread:
        said = ", ".join(f"{kind.name} (first {name})" for kind, name in unread.items())
        raise HFError(f"{file}: quantised as {said}, which is not read here; take a Q8_0, Q4_K_M or F16 file")
    return tensors


def _is_read(kind: GGMLQuantizationType) -> bool:
    """Whether tensors of this kind have values here: the library is asked with one block."""
    if kind.name in _PLAIN:
        return True
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
