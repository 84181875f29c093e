"""What comparing a few tokens at a time is worth: scoring hits and assigning tokens, by the size of a block.

    PYTHONPATH=. python benchmarks/retrieval_blocks.py CACHE

MiniLM's token vectors of ``retrieval_vectors.py``, its first 6,144 passages, random hits. Medians are printed, in
milliseconds a question, or for 8,192 tokens. The last size is everything at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from retrieval import TUNING, World

from jmlr_jax.retrieval import kmeans as kmeans_module
from jmlr_jax.retrieval import tokens as tokens_module
from jmlr_jax.retrieval.code import fit_code
from jmlr_jax.retrieval.tokens import TokenStore, gather, score_tokens, trimmed

SIZES = (32, 64, 128, 256, 512, 1024, 1 << 20)
CORPUS_TOKENS = 3_560_000  # of the whole corpus: its number of centroids


def by_size(work: Callable[[], object], module: object, name: str, rounds: int) -> list[float]:
    """Median seconds of the work with each size of block."""
    used, found = getattr(module, name), []
    for size in SIZES:
        setattr(module, name, size)
        jax.clear_caches()
        jax.block_until_ready(work())  # compilation
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(work())
            taken.append(time.perf_counter() - start)
        found.append(float(np.median(taken)))
    setattr(module, name, used)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 2.25])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    world, rng = World(args.cache, 6), np.random.default_rng(0)
    question = trimmed(world.q("medquad")[TUNING : TUNING + 1])[0]
    print("| ms | " + " | ".join("all" if size == SIZES[-1] else str(size) for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for bits in args.bits:
        code = fit_code(world.tokens_TxC, bits, CORPUS_TOKENS, seed=0)
        on_device = jax.device_put(code)
        store = TokenStore.of(world.pieces(), code, on_device)
        for hits, names in ((6000, ("centroid",)), (1500, tuple(store.arrays))):
            rows = rng.choice(len(store), hits, replace=False)
            work = partial(score_tokens, on_device, question, gather([store], names, rows), hits=hits)
            found = by_size(work, tokens_module, "AT_ONCE", args.rounds)
            how = "in full" if len(names) > 1 else "by centroids"
            of = f"{bits:g} bits, {hits:,} hits {how}, {len(question)} question tokens"
            print(f"| {of} | " + " | ".join(f"{1000 * s:.1f}" for s in found) + " |", flush=True)
    tokens = world.tokens_TxC[: kmeans_module.BATCH].astype(np.float32)
    work = partial(kmeans_module.nearest_centroid, tokens, on_device.centroids_GxC)
    found = by_size(work, kmeans_module, "COMPARED", args.rounds)
    of = f"8,192 tokens to {len(code.centroids_GxC):,} centroids"
    print(f"| {of} | " + " | ".join(f"{1000 * s:.1f}" for s in found) + " |")


if __name__ == "__main__":
    main()
