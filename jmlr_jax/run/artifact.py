"""What a folder of a run was made from, and whether that is still what is asked for.

A recipe names the folder it makes, the configuration keys it reads and the digests of what else it reads. Beside each
artifact lies its recipe as ``made_from.json``, written last: a folder without one is not finished. An artifact is
found again only by an equal recipe; any difference is named, by key or input, with what mends it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jmlr_jax.errors import JmlrError
from jmlr_jax.files import digest, write_text
from jmlr_jax.parallel.distributed import from_first

RECORD = "made_from.json"
FORMAT = 2  # raise when what artifacts hold changes its form


class ArtifactError(JmlrError):
    """An artifact that was made from something else than what is asked for, or never finished."""


@dataclass(frozen=True)
class Recipe:
    """How an artifact is made.

    Attributes:
      folder: what it makes.
      keys: dotted configuration key -> value, JSON; those that shape the artifact and no others.
      inputs: name of something read -> its digest: files, or other artifacts.
      places: where inputs lay, for the reader of the record; another place with the same content is no difference.
    """

    folder: Path
    keys: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of keys and inputs: what other recipes name this artifact by."""
        text = json.dumps([FORMAT, dict(self.keys), dict(self.inputs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Recipe | None:
        """The recipe that `folder` was made by; None where there is no finished artifact.

        Raises:
          ArtifactError: the record is damaged, or of another version of this program.
        """
        path = folder / RECORD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            recipe = cls(folder, dict(found["keys"]), dict(found["inputs"]), dict(found["places"]))
            intact = found["digest"] == recipe.digest and isinstance(found["files"], dict)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{path}: not a record ({error!r}); remove {folder} to make it again") from None
        if found.get("format") != FORMAT or not intact:
            raise ArtifactError(
                f"{path}: changed since it was written, or of another version of jmlr; remove {folder} to make it again"
            )
        return recipe

    def write(self, folder: Path | None = None, files: Mapping[str, str] | None = None) -> None:
        """Writes the record.

        Args:
          folder: where the artifact still lies, if not in its own.
          files: digests of its files, for :func:`check_files`; None where they have checks of their own.
        """
        found = {"format": FORMAT, "digest": self.digest, "keys": self.keys, "inputs": self.inputs}
        found |= {"places": self.places, "files": files or {}}
        write_text((folder or self.folder) / RECORD, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def differences(self, other: Recipe) -> list[str]:
        """One line for each key and input that differs from the recipe `other`, which made what is there."""
        said = []
        for key in dict.fromkeys((*other.keys, *self.keys)):
            old, new = (recipe.keys.get(key, _ABSENT) for recipe in (other, self))
            if old != new:
                said.append(f"{key} was {_shown(old)}, now {_shown(new)}")
        for name in dict.fromkeys((*other.inputs, *self.inputs)):
            old, new = (recipe.inputs.get(name) for recipe in (other, self))
            if old != new:
                place = self.places.get(name, other.places.get(name))
                what = f"{name} ({place})" if place else name
                said.append(f"{what} " + ("is new" if old is None else "is gone" if new is None else "has changed"))
        return said


def check_files(folder: Path, only: tuple[str, ...] = ()) -> None:
    """Raises ArtifactError unless every file that an artifact was finished with is there as it was, byte for byte.

    Args:
      folder: an artifact whose record can be read; without one nothing is known, and nothing checked.
      only: names of files in it; all if none is given.
    """
    if not (folder / RECORD).exists():
        return
    known = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    for name, was in known.items():
        if only and name not in only:
            continue
        file = folder / name
        try:
            now = digest(file)
        except FileNotFoundError:
            raise ArtifactError(f"{file}: is gone; {_again(folder)}") from None
        if now != was:
            raise ArtifactError(f"{file}: changed since it was written; {_again(folder)}")


def _again(folder: Path) -> str:
    return f"remove {folder} and give the command that made it again"


def listed(folder: Path) -> dict[str, str]:
    """Digests of the files of an artifact, by name below its folder; the record is none of them."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: digest(folder / name) for name in sorted(names) if name != RECORD}


def changes(recipe: Recipe) -> list[str] | None:
    """How `recipe` differs from what made its folder; none if they are equal, None if nothing is there.

    Of several processes the first looks, and all must ask.

    Raises:
      ArtifactError: what is there is damaged.
    """
    found: list[str] | None = from_first(lambda: _changes(recipe))
    return found


def _changes(recipe: Recipe) -> list[str] | None:
    old = recipe.folder.with_name(f".{recipe.folder.name}.old")
    if old.exists() and not recipe.folder.exists():  # killed between the two moves of `_make`
        old.rename(recipe.folder)
    made = Recipe.read(recipe.folder)
    if made is None:
        return None
    check_files(recipe.folder)
    return recipe.differences(made)


def refuse(recipe: Recipe, differ: list[str], remedy: str) -> None:
    """Raises ArtifactError with a line for each difference, and the remedy; without differences, nothing."""
    if differ:
        raise ArtifactError("\n".join([*(f"{recipe.folder}: {line}" for line in differ), remedy]))


def artifact(recipe: Recipe, make: Callable[[Path], None], said: Callable[[str], object] = lambda line: None) -> bool:
    """Makes an artifact whole or not at all, unless it is there already.

    One that was made by another recipe is replaced, and every difference said: callers refuse first where something
    else was made from it. It is made by the process that calls; of several, call it in the first (``from_first``).

    Args:
      make: fills the empty folder it is given.
      said: takes a line for each difference from what is replaced.

    Returns:
      Whether it was made now.

    Raises:
      ArtifactError: what is there is damaged, or another process is making it.
      OSError: the disk; what was there before stays.
    """
    differ = _changes(recipe)
    if differ == []:
        return False
    for line in differ or ():
        said(f"{recipe.folder}: made again, {line}")
    _make(recipe, make)
    return True


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """While this is open, no other process makes what lies in `folder`. One that is killed lets go of it.

    Its parent is made where it is not there, and is gone again after an error if nothing else is in it.

    Raises:
      ArtifactError: another process is making it.
    """
    fresh = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(file)
    try:
        with suppress(NotImplementedError):  # a mount without locks
            lock.acquire(blocking=False)
    except Timeout:
        raise ArtifactError(
            f"{folder}: another process is making it; wait until that one has ended, or give another --run-dir"
        ) from None
    try:
        yield
        fresh = []
    finally:
        file.unlink(missing_ok=True)
        for parent in fresh:
            with suppress(OSError):
                parent.rmdir()
        lock.release()


def _make(recipe: Recipe, make: Callable[[Path], None]) -> None:
    folder = recipe.folder
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    with making(folder):
        for left in (part, old):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir()
        try:
            make(part)
            recipe.write(part, listed(part))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


_ABSENT = object()


def _shown(value: Any) -> str:
    return "not given" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
