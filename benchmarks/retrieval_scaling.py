"""How recall, latency, memory and build time grow with the corpus, and what that makes of 0.1M, 1M and 24M passages.

    PYTHONPATH=. python benchmarks/retrieval_vectors.py CACHE
    PYTHONPATH=. python benchmarks/retrieval_scaling.py CACHE --times 1 10 100 --json scaling.json --png scaling.png

The base corpus is a random part of MedQuAD. Generated passages are added to it: each has the tokens of a real passage
outside the base, every third token exchanged for that of a passage like it, all turned by a little noise, so that they
compete with the real ones and no two are equal. They are made again from their number whenever they are needed.
10,000 of them are as hard for single vectors as 10,000 real ones: the first 1,000 hits by product hold .938 of the
exact 30 best of both, the first 2,000 .980 and .984.
Questions are MedQuAD's; the truth is exact MaxSim over everything. Each size runs in a process of its own, for its
peak of memory.

``--size`` makes the sizing table and the picture alone, from the JSON of an earlier run: bytes are counted, seconds
follow the work that is to be done (:func:`assigning`) at the speed of the two largest measured points.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import retrieval_vectors as source
from retrieval import PIECE, TOP, TUNING, World
from scipy.optimize import nnls

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.build import build_index
from jmlr_jax.retrieval.code import TOKENS_PER_CENTROID, centroid_count
from jmlr_jax.retrieval.kmeans import ROUNDS
from jmlr_jax.retrieval.scann import SAMPLE_PASSAGES, SAMPLE_TOKENS, ScannIndex, settings
from jmlr_jax.retrieval.store import open_index
from jmlr_jax.retrieval.vectors import TokenVectors

NOISE = 0.35  # length of what is added to a unit vector before it is scaled back to one
ALIKE = 16  # a passage's tokens are mixed with those of one of so many nearest to it by MiniLM's sentence vectors
GIB = 2**30


class Grown:
    """A base corpus with generated passages behind it."""

    def __init__(self, world: World, base: int, times: int):
        self.world, self.base, self.total = world, base, base * times
        self.others_DxA = nearest(world.pooled_NxD[base:])

    def passage(self, row: int) -> np.ndarray:
        """Token vectors float16 [length, C]; those behind the base depend on their number alone."""
        world = self.world
        if row < self.base:
            return world.tokens_TxC[world.offsets[row] : world.offsets[row + 1]]
        rng = np.random.default_rng(row)
        one = rng.integers(len(self.others_DxA))
        other = rng.choice(self.others_DxA[one])
        starts = (self.base + d for d in (one, other))
        a, b = (world.tokens_TxC[world.offsets[d] : world.offsets[d + 1]].astype(np.float32) for d in starts)
        a[::3] = b[rng.integers(0, len(b), len(a[::3]))]
        a += NOISE / np.sqrt(a.shape[1]) * rng.normal(size=a.shape)
        return (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float16)

    def rows(self, rows: np.ndarray) -> TokenVectors:
        """Passages, padded."""
        v = np.zeros((len(rows), source.PASSAGE_LENGTH, source.DIM), np.float16)
        keep = np.zeros(v.shape[:2], bool)
        for at, row in enumerate(rows.tolist()):
            tokens = self.passage(row)
            v[at, : len(tokens)], keep[at, : len(tokens)] = tokens, True
        return TokenVectors(v, keep)

    def encode_rows(self, rows: np.ndarray) -> Iterator[TokenVectors]:
        """Passages, a piece at a time."""
        for first in range(0, len(rows), PIECE):
            yield self.rows(rows[first : first + PIECE])


def nearest(pooled_DxV: np.ndarray) -> np.ndarray:
    """The others with the largest products, int64 [D, ALIKE]."""
    found = []
    for first in range(0, len(pooled_DxV), PIECE):
        like_BxD = pooled_DxV[first : first + PIECE] @ pooled_DxV.T
        like_BxD[np.arange(len(like_BxD)), first + np.arange(len(like_BxD))] = -np.inf
        found.append(np.argpartition(-like_BxD, ALIKE, axis=1)[:, :ALIKE])
    return np.concatenate(found)


def measure(grown: Grown, questions: int, overrides: dict[str, str]) -> dict[str, Any]:
    """One size: builds, tunes, saves, opens, asks."""
    world = grown.world
    q = world.q("medquad")
    some = np.arange(0, grown.total, 1 + grown.total // 10_000)
    start = time.perf_counter()
    for _ in grown.encode_rows(some):
        pass
    generation = (time.perf_counter() - start) * grown.total / len(some)  # taken off: real passages are not generated
    cfg = IndexConfig.model_validate({"kind": "scann", "rerank": 2000, "oracle_queries": TUNING, **overrides})
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    index = build_index(
        grown.encode_rows,
        grown.total,
        cfg,
        model_fingerprint="minilm",
        corpus_fingerprint="grown",
        sample_q_NxQxC=q[:TUNING],
        ann_recall_at=(TOP,),
    )
    assert index.curve is not None and isinstance(index.searcher, ScannIndex)
    peak = memory("VmHWM") - before  # the real passages, from which the others are made, are no part of the index
    tokens = int(index.searcher.parts[0].tokens.offsets[-1])
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        opened = open_index(folder, "minilm", "grown")
        asked = q[TUNING : TUNING + questions]
        opened.search(asked, TOP)
        for at in range(len(asked)):  # compilation
            opened.search(asked[at : at + 1], TOP)
        start = time.perf_counter()
        opened.search(asked, TOP)
        batch = len(asked) / (time.perf_counter() - start)
        each = []
        for at in range(len(asked)):
            start = time.perf_counter()
            opened.search(asked[at : at + 1], TOP)
            each.append(1000 * (time.perf_counter() - start))
    card = index.card
    return {
        "passages": grown.total,
        "tokens": tokens,
        "hits": card.hits,
        "leaves": card.leaves,
        "ann_recall@30": card.ann_recall[str(TOP)],
        "qps_batch": round(batch, 2),
        "p50_ms": round(float(np.percentile(each, 50)), 2),
        "p95_ms": round(float(np.percentile(each, 95)), 2),
        "build_seconds": round(card.build_seconds - generation, 1),
        "bytes": opened.card.total_bytes,
        "peak_bytes": peak,
        "curve": [point.model_dump() for point in index.curve.points],
    }


def memory(field: str) -> int:
    """Bytes of this process that Linux states: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def picture(points: list[dict[str, Any]], path: Path) -> None:
    """Recall over hits, all scored in full, for every size; latency and memory over the number of passages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    recall, *others = figure.subplots(1, 3)
    for point in points:
        full = [at for at in point["curve"] if at["spare"] == 1]
        hits = sorted({at["hits"] for at in full})
        best = [max(at["ann_recall"] for at in full if at["hits"] == one) for one in hits]
        recall.plot(hits, best, marker=".", label=f"{point['passages']:,} passages")
    recall.set(xscale="log", xlabel="hits", title="recall@30 of exact MaxSim")
    recall.legend()
    passages = [point["passages"] for point in points]
    lines = (
        ("ms a question", (("p50_ms", 1.0, "median"), ("p95_ms", 1.0, "95%"))),
        ("GiB", (("bytes", 1 / GIB, "on disk"), ("peak_bytes", 1 / GIB, "peak while building"))),
    )
    for axes, (title, series) in zip(others, lines, strict=True):
        for key, scale, label in series:
            axes.plot(passages, [point[key] * scale for point in points], marker="o", label=label)
        axes.set(xscale="log", xlabel="passages", title=title)
        axes.legend()
    figure.savefig(path, dpi=100)


def assigning(passages: float, tokens: float) -> float:
    """Multiplications, in units of 1e12, that compare tokens with all centroids, to learn the code and to use it."""
    sample = int(min(tokens, SAMPLE_TOKENS, tokens * SAMPLE_PASSAGES / passages))
    count = centroid_count(int(tokens), sample)
    fed = min(sample, count * TOKENS_PER_CENTROID)
    return (tokens + (ROUNDS + 1) * fed) * count * source.DIM / 1e12


def sizing(points: list[dict[str, Any]], hosts: tuple[int, ...] = (1, 8, 32)) -> str:
    """A table for 0.1M, 1M and 24M passages, with the model it follows."""
    cfg = IndexConfig()
    components = cfg.pca_components
    last = points[-1]
    per_passage = last["tokens"] / last["passages"]
    code = cfg.bits * source.DIM / 8 + 3  # centroid number and gain
    work = np.array([[p["passages"] / 1e6, assigning(p["passages"], p["tokens"])] for p in points])
    # Through the largest points without a constant: what a small build costs once is no matter at a million passages.
    fitted, _ = nnls(work[-2:], np.array([p["build_seconds"] for p in points[-2:]]))

    def seconds(passages: float, processes: int) -> float:
        return float(fitted @ [passages / 1e6, assigning(passages, passages * per_passage)]) / processes

    # Beside the index and the encodings: the sample, what learning and tuning hold.
    other = max(0, last["peak_bytes"] - last["bytes"] - 4 * components * last["passages"])
    lines = [
        f"model: {per_passage:.0f} tokens a passage at {code:.0f} bytes; ScaNN {components // 2} bytes a passage,",
        f"twice with a tree; while building {4 * components} bytes a passage of encodings, {other / GIB:.1f} GiB",
        f"for the sample, learning, tuning; {fitted[0]:.0f} seconds a million passages, {fitted[1]:.1f} a trillion",
        "multiplications of tokens and centroids, whose number grows with the square root of the tokens up to 16,384;",
        "the retriever's own encoding is not in it",
        "",
        "| passages | on disk | memory to search | memory to build | build | "
        + " | ".join(f"of {h}" for h in hosts[1:])
        + " |",
        "|---|---|---|---|---|" + "---|" * (len(hosts) - 1),
    ]
    for passages in (100_000, 1_000_000, 24_000_000):
        tokens = passages * per_passage * code + 8 * passages
        scann = passages * components / 2 * (2 if settings(passages).leaves else 1)
        disk = tokens + scann + 24 * passages
        building = disk + 4 * components * passages + other
        share = [f"{disk / h / GIB:.1f} GiB, {seconds(passages, h) / 3600:.1f} h" for h in hosts[1:]]
        lines.append(
            f"| {passages:,} | {disk / GIB:.1f} GiB | {(scann + 32 * passages) / GIB:.1f} GiB and page cache | "
            f"{building / GIB:.1f} GiB | {seconds(passages, 1) / 3600:.1f} h | " + " | ".join(share) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--base", type=int, default=2460, help="real passages")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--size", type=Path, metavar="JSON", help="sizing table and picture of an earlier run")
    parser.add_argument("--one", action="store_true", help="measure one size here and print it")
    parser.add_argument("index", nargs="*", help="overrides of the index: pca_components=256")
    args = parser.parse_intermixed_args()
    overrides = dict(pair.split("=", 1) for pair in args.index)
    if args.size:
        points = json.loads(args.size.read_text())
        if args.png:
            picture(points, args.png)
        print(sizing(points))
        return
    if args.one:
        grown = Grown(World(args.cache, None), args.base, args.times[0])
        print(json.dumps(measure(grown, args.questions, overrides)))
        return
    points = []
    for times in args.times:
        command = [sys.executable, __file__, str(args.cache), *args.index, "--one", "--base", str(args.base)]
        command += ["--times", str(times), "--questions", str(args.questions)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        points.append(json.loads(done.stdout.splitlines()[-1]))
        print({key: value for key, value in points[-1].items() if key != "curve"}, flush=True)
        if args.json:
            args.json.write_text(json.dumps(points, indent=1) + "\n")
    if args.png:
        picture(points, args.png)
    print(sizing(points))


if __name__ == "__main__":
    main()
