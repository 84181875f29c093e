"""Files that appear whole or not at all: what a crash leaves is the file from before, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath


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
