"""Peers of ``retrieval.py`` that need packages of their own: fast-plaid (PLAID) and FAISS.

They run in an environment apart, because fast-plaid asks for another torch than the tests:

    python3.11 -m venv PEERS && PEERS/bin/pip install numpy fast-plaid==1.7.0.2110 faiss-cpu==1.15.1

``retrieval.py --peers PEERS/bin/python`` starts this file as ``python retrieval_peers.py FOLDER`` and writes one JSON
request a line to it; an answer is one line. FOLDER holds the very vectors that every other system gets: ``tokens.npy``
float16 [T, C], ``offsets.npy``, ``pooled.npy`` float32 [N, D], ``queries.npy`` float16, ``query_offsets.npy``,
``pooled_queries.npy``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from fast_plaid import search

FOLDER = Path(sys.argv[1])
TOP = 30


def load(name: str) -> np.ndarray:
    """One of the shared arrays, memory-mapped."""
    return np.load(FOLDER / f"{name}.npy", mmap_mode="r")


def rows_of(tokens: np.ndarray, offsets: np.ndarray) -> list[torch.Tensor]:
    """One float16 tensor for each text."""
    return [torch.from_numpy(np.array(tokens[a:b])) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def size(path: Path) -> int:
    """Bytes of a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Plaid:
    """fast-plaid at some bits a dimension; ``n_full_scores`` and ``n_ivf_probe`` are its two knobs."""

    def __init__(self, nbits: int, n_full_scores: int, n_ivf_probe: int):
        self.knobs = {"n_full_scores": n_full_scores, "n_ivf_probe": n_ivf_probe}
        self.path = FOLDER / f"plaid_{nbits}"
        self.index = search.FastPlaid(index=str(self.path), device="cpu")
        built = FOLDER / f"plaid_{nbits}.json"
        if not built.exists():
            passages = rows_of(load("tokens"), load("offsets"))
            start = time.perf_counter()
            self.index.create(documents_embeddings=passages, nbits=nbits)
            built.write_text(json.dumps(time.perf_counter() - start))
        self.seconds, self.bytes = json.loads(built.read_text()), size(self.path)
        self.queries = rows_of(load("queries"), load("query_offsets"))

    def search(self, first: int, last: int) -> np.ndarray:
        """Rows of the best for some questions."""
        found = self.index.search(self.queries[first:last], top_k=TOP, show_progress=False, **self.knobs)
        rows = np.full((last - first, TOP), -1, np.int64)
        for at, one in enumerate(found):
            rows[at, : len(one)] = [row for row, _ in one]
        return rows


class Faiss:
    """IVF over pooled vectors by inner product, 4 sqrt(N) lists of which 16 are probed."""

    def __init__(self) -> None:
        pooled = np.array(load("pooled"))
        start = time.perf_counter()
        flat = faiss.IndexFlatIP(pooled.shape[1])
        self.index = faiss.IndexIVFFlat(flat, pooled.shape[1], int(4 * len(pooled) ** 0.5), faiss.METRIC_INNER_PRODUCT)
        self.index.train(pooled)
        self.index.add(pooled)
        self.seconds = time.perf_counter() - start
        self.index.nprobe = 16
        faiss.write_index(self.index, str(FOLDER / "faiss.index"))
        self.bytes = (FOLDER / "faiss.index").stat().st_size
        self.queries = np.array(load("pooled_queries"))

    def search(self, first: int, last: int) -> np.ndarray:
        """Rows of the best for some questions."""
        return self.index.search(self.queries[first:last], TOP)[1]


def main() -> None:
    """Answers requests until its input ends.

    ``{"open": NAME, ...}`` makes a system; ``{"search": NAME, "first": i, "last": j}`` times one call.
    """
    systems: dict[str, Any] = {}
    answer_to, sys.stdout = sys.stdout, sys.stderr  # what libraries print stays out of the answers
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            made = Plaid(**request["plaid"]) if "plaid" in request else Faiss()
            systems[request["open"]] = made
            answer: dict[str, Any] = {"build_seconds": made.seconds, "bytes": made.bytes}
        else:
            start = time.perf_counter()
            rows = systems[request["search"]].search(request["first"], request["last"])
            answer = {"seconds": time.perf_counter() - start, "rows": rows.tolist()}
        print(json.dumps(answer), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
