"""One process of a sharded search; tests/test_shards.py runs ``sharded_search.py ADDRESS ID COUNT OUT``."""

import sys
from pathlib import Path

import jax
import numpy as np
from indexes import build, clustered

from jmlr_jax.parallel.distributed import gather
from jmlr_jax.retrieval.shards import Shards, shard_fingerprint, shard_folder, shard_rows

PASSAGES, QUESTIONS, K = 203, 20, 6
KINDS = ("exact", "scann")


def allowed_rows() -> np.ndarray:
    """A filter that leaves the first shard with few rows."""
    return np.arange(PASSAGES) % 7 == 3


def main() -> None:
    """Builds and saves this process's shard of every kind of index, asks all shards; process i writes what it got."""
    address, number, count, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    jax.distributed.initialize(address, count, number)
    vectors, q = clustered(PASSAGES, QUESTIONS)
    rows = shard_rows(PASSAGES, number, count)
    found = {}
    for kind in KINDS:
        index = build(vectors.rows(slice(rows.start, rows.stop)), q, kind, rerank=PASSAGES)
        fingerprint = shard_fingerprint("corpus-a", rows, PASSAGES)
        index.card = index.card.model_copy(update={"corpus_fingerprint": fingerprint})
        index.save(shard_folder(out / kind, number, count))
        gather("saved")
        opened = Shards.open(out / kind, "model-a", "corpus-a", PASSAGES)
        found[f"{kind}/held"] = np.array([len(shard) for shard, _ in opened.held])
        found[f"{kind}/rows"], found[f"{kind}/scores"] = opened.search(q, K)
        found[f"{kind}/filtered"], _ = opened.search(q, K, allowed_rows())
    np.savez(f"{out}/{number}.npz", **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
