"""Systems that take turns, their times and sizes; for ``retrieval.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jmlr_jax.retrieval.bm25 import BM25
from jmlr_jax.retrieval.vectors import TokenVectors

TOP = 30
Search = Callable[[int, int], tuple[np.ndarray, float]]  # questions from, to -> rows [n, 30] and seconds


def local(search: Callable[[int, int], np.ndarray]) -> Search:
    """A search of this process, timed."""

    def timed(first: int, last: int) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        rows = search(first, last)
        return rows, time.perf_counter() - start

    return timed


def measure(systems: dict[str, Search], batch: int, single: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Medians over rounds in which the systems take turns; rankings are those of the last."""
    taken: dict[str, dict[str, list[Any]]] = {name: {"batch": [], "single": [], "rows": []} for name in systems}
    for search in systems.values():  # compilation, page faults
        search(0, batch)
        search(0, 1)
    for number in range(rounds):
        for name, search in systems.items():
            rows, seconds = search(0, batch)
            taken[name]["batch"].append(batch / seconds)
            taken[name]["rows"] = [rows]
            taken[name]["single"].append([search(at, at + 1)[1] for at in range(single)])
            print(f"round {number + 1}: {name}: {batch / seconds:.1f} questions/s", flush=True)
    found = {}
    for name, one in taken.items():
        each = np.median(np.array(one["single"]), axis=0)
        found[name] = {
            "rows": one["rows"][0],
            "qps_batch": round(float(np.median(one["batch"])), 2),
            "qps_single": round(float(1 / each.mean()), 2),
            "p50_ms": round(1000 * float(np.percentile(each, 50)), 2),
            "p95_ms": round(1000 * float(np.percentile(each, 95)), 2),
        }
    return found


def size_of(bm25: BM25, folder: Path) -> int:
    """Bytes of a BM25 index on disk."""
    assert bm25._index is not None
    bm25._index.save(str(folder))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def arrays(piece: TokenVectors) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a piece."""
    return piece.vectors_NxPxC, piece.keep_NxP
