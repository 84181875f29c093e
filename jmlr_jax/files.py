"""Where files lie, and files that appear whole or not at all: what a crash leaves is the one from before, or none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from etils import epath

from jmlr_jax.errors import JmlrError

SAMPLED_ABOVE = 1 << 30  # bytes
PIECE, PIECES = 1 << 20, 256

BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
"""Schemes of addresses that can be read, with the library that each needs."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes gs:/ of gs://


class PlaceError(JmlrError, ValueError):
    """A path that cannot serve; the message names it and what mends it."""


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address such as ``gs://bucket/file``."""
    return _ADDRESS.match(os.fspath(path)) is not None


def expanded(path: str) -> str:
    """`path` with ``~`` and ``$NAME`` as a shell would read them, also where none has."""
    return os.path.expandvars(os.path.expanduser(path))


def check_local(path: str) -> str:
    """`path` expanded, unless it is an address: pathlib would take that for a folder of this name and write there.

    Raises:
      PlaceError: it is one, such as ``gs://bucket/runs``.
    """
    if is_address(path):
        raise PlaceError(
            f"{path}: is an address, not a folder of this machine; mount the bucket and give the path there, "
            "such as /mnt/jmlr/runs/a (docs/tpu.md)"
        )
    return expanded(path)


def check_readable(path: str) -> str:
    """`path` expanded, unless it is an address that nothing here reads.

    Raises:
      PlaceError: it is one, such as ``https://host/file``.
    """
    address = _ADDRESS.match(path)
    if address and address[1].lower() not in BUCKETS:
        raise PlaceError(f"{path}: {address[1]}: is not read here; download what is there and give the file's path")
    return expanded(path)


def any_path(path: str | os.PathLike[str]) -> epath.Path:
    """`path`, on this machine or in a bucket.

    Raises:
      PlaceError: an address that nothing here reads, or a bucket whose library is not installed.
    """
    address = _ADDRESS.match(check_readable(os.fspath(path)))
    if address and find_spec(library := BUCKETS[address[1].lower()]) is None:
        raise PlaceError(f"{path}: reading it needs {library}: pip install {library}, or give the path of a copy")
    return epath.Path(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """`path` as it is told from anywhere on this machine; an address is one already."""
    return os.fspath(path) if is_address(path) else os.path.abspath(path)


def local_path(path: str | os.PathLike[str]) -> Path:
    """`path` on this machine, absolute; errors as :func:`check_local`."""
    return Path(check_local(os.fspath(path))).absolute()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[Any]]:
    """A binary file to write into that becomes `path` when the block ends well; `path` stays as it was otherwise.

    Missing folders are made. What a killed process leaves is a hidden sibling ``.NAME.PID.part``, which nothing reads.

    Raises:
      OSError: the disk; `path` is as it was.
    """
    target = any_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            with contextlib.suppress(AttributeError, OSError):  # of a bucket: closing it is what uploads it
                os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The file `path` with this text, UTF-8; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def digest(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a file, or of the names and contents of the files directly in a directory.

    Of a file above ``SAMPLED_ABOVE`` bytes its size and evenly spread pieces count: a checkpoint of many gigabytes is
    told from another one without being read whole.

    Raises:
      FileNotFoundError: there is nothing.
    """
    target, hasher = any_path(path), hashlib.sha256()
    for file in sorted(target.iterdir()) if target.is_dir() else [target]:
        if not file.is_dir():
            hasher.update(f"{file.name if file != target else ''}\0".encode())
            _hash_file(file, hasher)
    return hasher.hexdigest()


def _hash_file(file: epath.Path, hasher: hashlib._Hash) -> None:
    size = file.stat().length
    hasher.update(f"{size}\0".encode())
    with file.open("rb") as stream:
        if size <= SAMPLED_ABOVE:
            while chunk := stream.read(PIECE):
                hasher.update(chunk)
            return
        for number in range(PIECES):
            stream.seek(number * (size - PIECE) // (PIECES - 1))
            hasher.update(stream.read(PIECE))
