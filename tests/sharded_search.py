"""One process of a sharded search; tests/test_shards.py runs ``sharded_search.py ADDRESS ID COUNT OUT``."""

import sys

import jax
import numpy as np
from indexes import CFG, clustered

from jmlr_jax.retrieval.shards import ShardedIndex

PASSAGES, QUESTIONS, K = 203, 70, 6
CASES = {"exact": {"kind": "exact"}, "float16": {"bits": 16}, "coded": {"bits": 4}}


def allowed_rows() -> np.ndarray:
    """A filter that leaves the first share with few rows."""
    return np.arange(PASSAGES) % 7 == 3


def main() -> None:
    """Builds and searches every case; process i writes what it got."""
    address, number, count, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    jax.distributed.initialize(address, count, number)
    vectors, q = clustered(PASSAGES, QUESTIONS)

    def encode(rows: np.ndarray):
        return [vectors.rows(part) for part in np.array_split(rows, 2) if len(part)]

    found = {}
    for name, changes in CASES.items():
        index = ShardedIndex.build(encode, PASSAGES, CFG.model_copy(update=changes))
        found[f"{name}/rows"], found[f"{name}/scores"] = index.search(q, K)
        found[f"{name}/filtered"], _ = index.search(q, K, allowed_rows())
        found[f"{name}/size"] = np.array([len(index), len(index.own)])
    np.savez(f"{out}/{number}.npz", **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
