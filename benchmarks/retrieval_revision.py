"""The index of one revision of this package as a system of ``retrieval_cosines.py``, in a process of its own.

``retrieval_cosines.py`` starts it as ``PYTHONPATH=TREE python retrieval_revision.py FOLDER`` and writes a JSON request
a line to it, as to ``retrieval_peers.py``; an answer is one line. FOLDER holds the vectors that every system gets:
``tokens.npy`` float16 [T, C], ``offsets.npy``, ``queries.npy``, ``query_offsets.npy``, and ``tuning.npy`` with
``tuning_offsets.npy``, the questions that an index is tuned on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval import build
from jmlr_jax.retrieval.vectors import TokenVectors

FOLDER = Path(sys.argv[1])
TOP, PIECE = 30, 1024
RECALL = "ann_recall" if "ann_recall" in IndexConfig.model_fields else "recall"  # as it was called before
BUILD: Any = getattr(build, "build_index_streamed", None) or build.build_index


def padded(name: str, offsets_name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [n, longest, C] of some texts, and which of them there are."""
    flat, offsets = np.load(FOLDER / f"{name}.npy", mmap_mode="r"), np.load(FOLDER / f"{offsets_name}.npy")
    lengths = np.diff(offsets)[rows]
    vectors = np.zeros((len(rows), int(lengths.max()), flat.shape[1]), flat.dtype)
    keep = np.arange(vectors.shape[1]) < lengths[:, None]
    for at, row in enumerate(rows):
        vectors[at, : lengths[at]] = flat[offsets[row] : offsets[row + 1]]
    return vectors, keep


def encode_rows(rows: np.ndarray) -> Iterator[TokenVectors]:
    """Token vectors of passages, a piece at a time."""
    for first in range(0, len(rows), PIECE):
        yield TokenVectors(*padded("tokens", "offsets", rows[first : first + PIECE]))


def questions(name: str, offsets_name: str) -> np.ndarray:
    """All questions of a set, float32 [n, Q, C], zero where there is no token."""
    count = len(np.load(FOLDER / f"{offsets_name}.npy")) - 1
    return padded(name, offsets_name, np.arange(count))[0].astype(np.float32)


def main() -> None:
    """Answers requests until its input ends.

    ``{"open": NAME, "bits": b, "recall": r, "rerank": h, "truth": rows}`` builds an index, tuned to r, and says how
    many of the exact best rows are among its first hits; ``{"search": NAME, "first": i, "last": j}`` times one call.
    """
    systems: dict[str, Any] = {}
    asked = questions("queries", "query_offsets")
    answer_to, sys.stdout = sys.stdout, sys.stderr  # what libraries print stays out of the answers
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            passages = len(np.load(FOLDER / "offsets.npy")) - 1
            given = {"kind": "scann", "bits": request["bits"], "rerank": request["rerank"], RECALL: request["recall"]}
            index = BUILD(
                encode_rows,
                passages,
                IndexConfig.model_validate(given),
                model_fingerprint="minilm",
                corpus_fingerprint="medquad",
                sample_q_NxQxC=questions("tuning", "tuning_offsets"),
                **{f"{RECALL}_at": (TOP,)},
            )
            systems[request["open"]] = index
            with tempfile.TemporaryDirectory() as folder:
                index.save(folder)
            truth, first_hits = np.array(request["truth"]), []
            for at in range(0, len(truth), 64):
                first_hits.append(index.searcher.nearest(asked[at : at + 64][: len(truth) - at], 1000)[0])
            hits = np.concatenate(first_hits)
            among = {
                k: float(np.mean([np.isin(t, h[:k]).mean() for t, h in zip(truth, hits, strict=True)]))
                for k in (100, 300, 1000)
            }
            chosen = index.curve.chosen
            answer = {
                "build_seconds": index.card.build_seconds,
                "bytes": index.card.total_bytes,
                "among": among,
                "hits": chosen.hits,
                "scored": chosen.scored,
                "leaves": chosen.leaves,
                "tuned": getattr(chosen, RECALL),
            }
        else:
            start = time.perf_counter()
            rows, _ = systems[request["search"]].search(asked[request["first"] : request["last"]], TOP)
            answer = {"seconds": time.perf_counter() - start, "rows": rows.tolist()}
        print(json.dumps(answer), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
