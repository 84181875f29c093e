"""Checksums of arrays by their content, so that weights and checkpoints that changed on disk are told from those saved.

The storage library checks the structure of its files, not every byte of its data: a flipped bit of a weight can come
back as another weight. A sum here is of the words of an array and their places, added modulo 2^32: no single change
leaves it as it was, and it does not depend on which process holds which part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmlr_jax.files import write_text
from jmlr_jax.parallel.distributed import gather
from jmlr_jax.run.artifact import ArtifactError

CHECKS = "checks.json"  # of a phase: what it ended with
CHUNK = 1 << 22  # words that are added up at once
_ODD = (2, 0x9E3779B2)  # what places are multiplied with, before 1 is added: every factor is odd


def checksums(tree: Any) -> dict[str, str]:
    """A checksum of every array of a tree, hex by path; every process of a job must call it.

    Args:
      tree: JAX arrays, of which each process has its part, or NumPy arrays that all processes have alike.
    """
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total = [0, 0]
        for part, start in _parts(leaf):
            for i, each in enumerate(_sums(part, start, leaf.shape)):
                total[i] += each
        sums[f"{jax.tree_util.keystr(path)} {leaf.dtype} {list(leaf.shape)}"] = total
    everyone = gather(sums)
    return {
        name: "".join(f"{sum(each[name][i] for each in everyone) % 2**32:08x}" for i in range(len(_ODD)))
        for name in sums
    }


def differing(tree: Any, saved: Mapping[str, str]) -> list[str]:
    """Paths of arrays that are not as they were when `saved` was taken, or that only one of both has."""
    now = checksums(tree)
    return [name.split(" ")[0] for name in dict.fromkeys((*saved, *now)) if saved.get(name) != now.get(name)]


def file_sum(file: Path) -> str:
    """sha256 (hex) of a file; of one that is not there, that of an empty one."""
    return hashlib.sha256(file.read_bytes() if file.exists() else b"").hexdigest()


def write_checks(folder: Path, of: str, halves: Mapping[str, Mapping[str, str]], metrics: str) -> None:
    """Writes ``checks.json``.

    Args:
      folder: of the phase.
      of: digest of the recipe of their phase.
      halves: their checksums.
      metrics: sha256 of the phase's ``metrics.jsonl``.
    """
    write_text(folder / CHECKS, json.dumps({"of": of, "halves": halves, "metrics": metrics}, indent=1) + "\n")


def read_checks(folder: Path) -> dict[str, Any]:
    """What :func:`write_checks` wrote.

    Raises:
      ArtifactError: it is not there, or no such record.
    """
    try:
        found = json.loads((folder / CHECKS).read_text(encoding="utf-8"))
        return {"of": str(found["of"]), "halves": dict(found["halves"]), "metrics": str(found["metrics"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{folder / CHECKS}: not a record of checksums ({type(error).__name__}); remove {folder / 'weights'} and "
            "run `jmlr train`, which continues from the last checkpoint"
        ) from None


def _parts(leaf: Any) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """What this process brings of an array, and where each part begins; of copies one."""
    if not isinstance(leaf, jax.Array):
        return [(leaf, (0,) * leaf.ndim)] if jax.process_index() == 0 else []
    return [
        (np.asarray(shard.data), tuple(where.start or 0 for where in shard.index))
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _sums(part: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """The sums of one part of an array of `shape`."""
    words = np.ascontiguousarray(part).reshape(part.shape or (1,))
    words = words.view(np.dtype(f"u{words.dtype.itemsize}"))
    if words.dtype.itemsize == 8:
        words = (words ^ (words >> np.uint64(32))).astype(np.uint32)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))] or [1]
    begin = start or (0,)
    totals = [0] * len(_ODD)
    rows = max(1, CHUNK // max(1, math.prod(words.shape[1:])))
    for first in range(0, len(words), rows):
        block = words[first : first + rows].astype(np.uint32)
        place = np.zeros((), np.uint64)
        for axis, size in enumerate(block.shape):
            at = np.arange(size, dtype=np.uint64) + np.uint64(begin[axis] + (first if axis == 0 else 0))
            place = place[..., None] + at * np.uint64(strides[axis])
        for i, odd in enumerate(_ODD):
            factor = (place * np.uint64(odd) + np.uint64(1)).astype(np.uint32)
            totals[i] += int(np.sum(block * factor, dtype=np.uint64))
    return totals
