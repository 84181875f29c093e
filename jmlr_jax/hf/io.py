"""Safetensors files and directories, read and written tensor by tensor.

A file is an 8-byte little-endian header size, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the bytes. It
is read and written here, not by the library, because a model larger than the host's memory must pass in pieces.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmlr_jax.errors import JmlrError
from jmlr_jax.files import AnyPath, any_path
from jmlr_jax.parallel.progress import track

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
DTYPES: dict[str, Any] = FLOATS | {
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_JSON = 1 << 28  # bytes
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


class HFError(JmlrError, ValueError):
    """A Hugging Face directory that cannot be read or written faithfully; the message names file, field and remedy."""


@dataclass(frozen=True)
class Entry:
    """One tensor: where its bytes are. `dtype` is the format's name for it, e.g. ``BF16``."""

    file: AnyPath
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    size: int

    def read(self) -> np.ndarray:
        """The tensor. On a local disk a memory map, of which only the parts that are used are read.

        Raises:
            HFError: the dtype is none that is known here.
        """
        if self.dtype not in DTYPES:
            raise HFError(
                f"{self.file}: dtype {self.dtype} is not read here; save the model as float32, bfloat16 or float16"
            )
        dtype = np.dtype(DTYPES[self.dtype])
        local = Path(os.fspath(self.file))
        if self.size and local.is_file():
            return np.memmap(local, dtype, "r", self.start, self.shape)
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return np.frombuffer(stream.read(self.size), dtype).reshape(self.shape)


def read_header(file: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of one safetensors file, every byte of it accounted for.

    Raises:
        HFError: the file is truncated, damaged, or no safetensors file.
    """
    path = any_path(file)
    total = path.stat().length
    remedy = "download or export it again"
    with path.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LONGEST_HEADER + 1
        if length > _LONGEST_HEADER:
            raise HFError(f"{path}: not a safetensors file, or its beginning is damaged; {remedy}")
        if 8 + length > total:
            raise HFError(f"{path}: truncated within its header ({total} bytes of at least {8 + length}); {remedy}")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise HFError(f"{path}: its header is not JSON ({error}); {remedy}") from error
    if not isinstance(header, dict):
        raise HFError(f"{path}: its header is not a table of tensors; {remedy}")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, row in header.items():
        try:
            dtype, shape, (start, end) = str(row["dtype"]), tuple(map(int, row["shape"])), row["data_offsets"]
            entries[name] = Entry(path, dtype, shape, 8 + length + int(start), int(end) - int(start))
        except (KeyError, TypeError, ValueError) as error:
            raise HFError(f"{path}: header entry of {name} is malformed; {remedy}") from error
        if dtype in DTYPES and (min(shape, default=1) < 0 or entries[name].size != _bytes(dtype, shape)):
            raise HFError(
                f"{path}: {name} has {entries[name].size} bytes, {dtype} {list(shape)} needs {_bytes(dtype, shape)}"
            )
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != at:
            raise HFError(f"{path}: the bytes of {name} overlap others or leave a gap; {remedy}")
        at += entry.size
    if at != total:
        fault = "truncated" if total < at else "followed by bytes that belong to no tensor"
        raise HFError(f"{path}: {fault} ({total} bytes, its header describes {at}); {remedy}")
    return entries


def read_directory(directory: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of a model directory: of ``model.safetensors``, or of all files that the index names.

    Raises:
        HFError: no safetensors there (pickled weights are refused), a tensor in two files, or an index that disagrees
            with its files.
    """
    folder = any_path(directory)
    if not folder.is_dir():
        raise HFError(f"{folder}: no such directory")
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise HFError(_without_weights(folder))
        return read_header(folder / SINGLE)
    if (folder / SINGLE).exists():
        raise HFError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise HFError(f"{folder / INDEX}: no weight_map from tensors to files")
    strange = sorted({name for name in weight_map.values() if PurePosixPath(name).name != name})
    if strange:
        raise HFError(f"{folder / INDEX}: names files outside the directory: {', '.join(strange)}")
    files = sorted(set(weight_map.values()))
    lost = [name for name in files if not (folder / name).exists()]
    if lost:
        raise HFError(f"{folder}: {INDEX} names files that are not there: {', '.join(lost)}; download them")
    found: dict[str, Entry] = {}
    faults = []
    for name in files:
        for key, entry in read_header(folder / name).items():
            if key in found:
                faults.append(f"{key} is set twice, in {found[key].file.name} and in {name}")
            elif weight_map.get(key) != name:
                faults.append(f"{key} is in {name}, the index has it in {weight_map.get(key, 'no file')}")
            found[key] = entry
    faults += [f"{key} is not in {name}" for key, name in weight_map.items() if key not in found]
    if faults:
        raise HFError("\n".join([f"{folder}: {INDEX} and its files disagree:", *faults]))
    return found


def read_json(file: str | os.PathLike[str], kind: type = dict) -> Any:
    """A JSON object, or the list that `kind` asks for; raises HFError naming the file where there is none."""
    path = any_path(file)
    if not path.exists():
        raise HFError(f"{path}: no such file")
    if path.stat().length > MAX_JSON:
        raise HFError(f"{path}: has {path.stat().length:,} bytes; no file of its kind needs more than {MAX_JSON:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HFError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise HFError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}")
    return value


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written; `read` gives its value when its turn comes, and it is let go afterwards."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(directory: str | os.PathLike[str], tensors: Sequence[Tensor], shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or several files of at most `shard_bytes` and their index; one tensor in memory.

    Raises:
        ValueError: two tensors of one name, or a value that is not of its stated shape and dtype.
    """
    folder = any_path(directory)
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have one name")
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def write_file(file: str | os.PathLike[str], tensors: Sequence[Tensor]) -> None:
    """Writes one safetensors file; see :func:`write_directory`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    at = 0
    for tensor in tensors:
        span = [at, at := at + tensor.size]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with any_path(file).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor in track(tensors, len(tensors), f"writing {any_path(file).name}", "tensors"):
            value = np.ascontiguousarray(tensor.read()).reshape(tensor.shape)
            if value.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} is {value.dtype}, not {tensor.dtype}")
            stream.write(value.view(np.uint8).data if value.ndim else value.tobytes())


def write_json(file: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON as Hugging Face libraries do: indented, UTF-8, final newline."""
    any_path(file).write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def whole_directory(directory: str | os.PathLike[str]) -> Iterator[AnyPath]:
    """A folder to write into that becomes `directory` when the block ends well; nothing is left there otherwise.

    What a killed process leaves is a hidden sibling ending in ``.part``; the next attempt removes it.

    Raises:
        HFError: `directory` exists and is not an empty folder.
    """
    target = any_path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HFError(f"{target}: exists already; give a new directory, or remove it first")
    part = target.parent / f".{target.name}.part"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        part.rmtree()
        raise
    if target.exists():
        target.rmtree()
    part.rename(target)


def _bytes(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def _without_weights(folder: AnyPath) -> str:
    """Why a directory without safetensors is refused, and what mends it."""
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{folder}: holds pickled weights only ({', '.join(pickled)}), which can run code and are never read here. "
            "Convert them where you trust them: load the model with transformers and call "
            "model.save_pretrained(directory), which writes safetensors"
        )
    if "adapter_config.json" in names:
        return f"{folder}: holds PEFT adapters, not a model; give the directory of the merged model"
    return f"{folder}: neither {SINGLE} nor {INDEX} is there"
