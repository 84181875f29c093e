"""Where files lie, and files that appear whole or not at all: what a crash leaves is the one from before, or none."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from etils import epath

from jmlr_jax.errors import JmlrError

SAMPLED_ABOVE = 1 << 30  # bytes
PIECE, PIECES = 1 << 20, 256

BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
"""Schemes of addresses that can be read, with the library that each needs."""

TROUBLES = {  # of a disk: what a library says of it, and what mends it
    errno.ENOSPC: ("No space left on device", "no space left; free some, the same command continues"),
    errno.EDQUOT: ("Disk quota exceeded", "the quota is used up; free some, the same command continues"),
    errno.EFBIG: ("File too large", "the file would be larger than it may be there; give another place"),
    errno.EROFS: ("Read-only file system", "nothing can be written there; give a place that can be written"),
    errno.EACCES: ("Permission denied", "this user has no permission; change it, or give another place"),
    errno.EPERM: ("Operation not permitted", "this user has no permission; change it, or give another place"),
    errno.EIO: ("Input/output error", "the disk cannot be read or written there; give the path of a copy"),
}

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes gs:/ of gs://


AnyPath = epath.Path
"""A path on this machine or in a bucket, as :func:`any_path` gives it."""


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


def disk_trouble(error: BaseException) -> str | None:
    """One line for an error of the disk, or of a library that met one: where, and what mends it; None for any other."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        each = each.__cause__ or each.__context__
    for each in seen:
        text = str(each)
        number = each.errno if isinstance(each, OSError) else None
        number = number or next((n for n, (words, _) in TROUBLES.items() if words.lower() in text.lower()), None)
        if number in TROUBLES:
            place = each.filename if isinstance(each, OSError) else None
            named = re.search(r"(?<![\w.])/[^\s\"':,\]]+", text)
            place = place or (named[0].rstrip(".") if named else "the disk")
            return f"{os.fspath(place)}: {TROUBLES[number][1]}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return None


def write_sealed(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """A JSON object with the sha256 of the rest of it as ``sha256``, for :func:`read_sealed`."""
    write_text(path, json.dumps({**content, "sha256": _seal(content)}, indent=1) + "\n")


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_sealed` wrote; empty where there is no file.

    Raises:
      PlaceError: the file is damaged.
    """
    file = any_path(path)
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        if content.pop("sha256") == _seal(content):
            return dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise PlaceError(f"{path}: changed since it was written; remove it, which loses these figures alone")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
