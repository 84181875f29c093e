"""The index on vectors with a large common part, beside an earlier revision of it and PLAID.

    PYTHONPATH=. python benchmarks/retrieval_vectors.py CACHE
    git worktree add EARLIER REVISION
    PYTHONPATH=. python benchmarks/retrieval_cosines.py CACHE --before EARLIER --peers PEERS/bin/python --json rows.json

Modern late-interaction encoders give token vectors whose mean cosine is up to 0.95. Here MiniLM's vectors of
``retrieval_vectors.py`` are all moved along one direction and normalised again, passages and questions alike, until
their mean cosine is the one asked for. For each cosine every system builds its index of the same arrays; 200 questions
tune ours, others are asked. Systems take turns in ``--rounds`` rounds and medians are kept, so that what else the
machine does meets all of them: compare within a run. Printed: how many of the 30 best by exact MaxSim are among the
first 100, 300 and 1,000 hits of the single vectors, ANN recall@30, what is scored, and questions a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from retrieval import PIECE, TOP, TUNING, Peers, Search, World, measure

from jmlr_jax.retrieval.exact import ExactSearch
from jmlr_jax.retrieval.tune import ann_recall

HERE = Path(__file__).parent


def mean_cosine(x_TxC: np.ndarray) -> float:
    """Of two of these unit vectors, as if drawn with replacement."""
    return float(np.sum(x_TxC.mean(0, dtype=np.float64) ** 2))


def moved(x_TxC: np.ndarray, by_C: np.ndarray) -> np.ndarray:
    """Unit vectors moved by one vector and normalised again, float16."""
    out = np.empty(x_TxC.shape, np.float16)
    for first in range(0, len(x_TxC), 1 << 18):
        y = x_TxC[first : first + (1 << 18)].astype(np.float32) + by_C
        out[first : first + len(y)] = y / np.linalg.norm(y, axis=1, keepdims=True)
    return out


def common_part(x_TxC: np.ndarray, cosine: float) -> np.ndarray:
    """What to move these vectors by for a mean cosine: a random direction of the length that bisection finds."""
    some = x_TxC[:: max(1, len(x_TxC) // 20_000)]
    direction = np.random.default_rng(7).normal(size=x_TxC.shape[1]).astype(np.float32)
    direction /= np.linalg.norm(direction)
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_cosine(moved(some, middle * direction)) < cosine else (low, middle)
    return high * direction


def truth_of(world: World, questions: np.ndarray) -> np.ndarray:
    """The TOP best rows by exact MaxSim."""
    search = ExactSearch(questions, TOP)
    for number, piece in enumerate(world.pieces()):
        search.add(piece, number * PIECE)
    return search.result()[0]


def one_cosine(args: argparse.Namespace, cosine: float | None) -> list[dict[str, Any]]:
    """A row for every system on vectors of this mean cosine; None: as they are."""
    world = World(args.cache, args.parts)
    if cosine is not None:
        by_C = common_part(world.tokens_TxC, cosine)
        world.tokens_TxC = moved(world.tokens_TxC, by_C)
        queries = world.queries["medquad"]
        queries["tokens_TxC"] = moved(queries["tokens_TxC"], by_C)
    found = mean_cosine(world.tokens_TxC[::37].astype(np.float32))
    print(f"{len(world.passages):,} passages, mean cosine {found:.3f}", flush=True)
    questions = world.q("medquad")[TUNING : TUNING + args.batch]
    truth = truth_of(world, questions)
    folder = args.cache / f"cosine_{cosine}_{len(world.passages)}"
    systems: dict[str, Search] = {}
    facts: dict[str, dict[str, Any]] = {}
    trees = {"before": args.before, "now": HERE.parent} if args.before else {"now": HERE.parent}
    for name, tree in trees.items():
        script = HERE / "retrieval_revision.py"
        process = Peers(sys.executable, world, folder, TUNING, script, os.environ | {"PYTHONPATH": str(tree)})
        for bits in args.bits:
            of = f"{name}, {bits:g} bits"
            wanted = {"bits": bits, "recall": args.recall, "rerank": args.rerank, "truth": truth.tolist()}
            facts[of] = process.ask(open=of, **wanted)
            systems[of] = process.search(of)
            print(of, facts[of], flush=True)
    if args.peers:
        process = Peers(args.peers, world, folder, TUNING)
        for setting in args.plaid:
            nbits, full, probe = (int(part) for part in setting.split(":"))
            of = f"fast-plaid, {nbits} bits, {full} scored, {probe} probed"
            facts[of] = process.ask(open=of, plaid={"nbits": nbits, "n_full_scores": full, "n_ivf_probe": probe})
            systems[of] = process.search(of)
            print(of, facts[of], flush=True)
    rows = []
    for name, one in measure(systems, len(questions), min(args.single, len(questions)), args.rounds).items():
        recall = round(ann_recall(truth, one.pop("rows")), 4)
        rows.append({"cosine": round(found, 3), "system": name, "ann_recall@30": recall, **one, **facts[name]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--before", type=Path, metavar="TREE", help="checkout of an earlier revision, to compare with")
    parser.add_argument("--peers", help="python of the environment of retrieval_peers.py; without it no PLAID")
    parser.add_argument("--plaid", nargs="+", default=["4:1024:4"], metavar="BITS:SCORED:PROBED")
    parser.add_argument("--cosines", nargs="*", type=float, default=[0.5, 0.8, 0.95], help="beside vectors as they are")
    parser.add_argument("--parts", type=int, help="parts of 1,024 passages; default: all")
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0])
    parser.add_argument("--recall", type=float, default=0.95, help="ANN recall that ours is tuned to")
    parser.add_argument("--rerank", type=int, default=3000, help="hits that ours scores at most")
    parser.add_argument("--batch", type=int, default=100, help="questions asked in one batch")
    parser.add_argument("--single", type=int, default=25, help="questions asked one at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="one row for each system and cosine")
    args = parser.parse_args()
    rows = []
    for cosine in [None, *args.cosines]:
        rows += one_cosine(args, cosine)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
