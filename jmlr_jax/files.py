"""Files that appear whole or not at all: what a crash leaves is the file from before, or none."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

SAMPLED_ABOVE = 1 << 30  # bytes
PIECE, PIECES = 1 << 20, 256


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[Any]]:
    """A binary file to write into that becomes `path` when the block ends well; `path` stays as it was otherwise.

    Missing folders are made. What a killed process leaves is a hidden sibling ``.NAME.PID.part``, which nothing reads.

    Raises:
      OSError: the disk; `path` is as it was.
    """
    target = epath.Path(path)
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
    target, hasher = epath.Path(path), hashlib.sha256()
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
