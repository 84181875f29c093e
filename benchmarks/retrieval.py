"""Retrieval side by side: ours, exact MaxSim, PLAID, FAISS IVF over pooled vectors, BM25.

    PYTHONPATH=. python benchmarks/retrieval_vectors.py CACHE
    PYTHONPATH=. python benchmarks/retrieval.py CACHE --peers PEERS/bin/python --json rows.json --quality quality.json

MedQuAD's passages and test questions, MiniLM's token vectors of both (``retrieval_vectors.py``), the same arrays for
every system; encoding questions is not timed. One row a system: ANN recall@30 (agreement with exact MaxSim), questions
per second in one batch and one at a time, latencies, build time, bytes on disk. Systems take turns in ``--rounds``
rounds of one run and the medians are kept, so that what else the machine does meets them all. ``--quality`` writes
nDCG@10 and recall@k, with bootstrap intervals, on the human judgements of LiveQA and on MedQuAD's own pairs of
question and answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import retrieval_vectors as source
from retrieval_measure import TOP, Search, arrays, local, measure, size_of

from jmlr_jax.config import IndexConfig
from jmlr_jax.evaluation.intervals import bootstrap_interval
from jmlr_jax.retrieval.bm25 import BM25
from jmlr_jax.retrieval.build import build_index
from jmlr_jax.retrieval.exact import ExactIndex, ExactSearch
from jmlr_jax.retrieval.fusion import reciprocal_rank
from jmlr_jax.retrieval.store import open_index
from jmlr_jax.retrieval.tune import Point, ann_recall, cheapest
from jmlr_jax.retrieval.vectors import TokenVectors

PIECE, TUNING = 1024, 200  # the first TUNING test questions tune our index and are not measured


class World:
    """The corpus in the order it was encoded in, and the questions.

    Args:
      cache: folder of ``retrieval_vectors.py``.
      parts: how many of its parts to use; None: all.
    """

    def __init__(self, cache: Path, parts: int | None):
        found = [dict(np.load(path)) for path in sorted(cache.glob("part_*.npz"))[:parts]]
        passages = source.corpus()
        self.passages = [passages[row] for part in found for row in part["rows"]]
        self.row = {passage["id"]: row for row, passage in enumerate(self.passages)}
        self.tokens_TxC = np.concatenate([part["tokens_TxC"] for part in found])
        lengths = np.concatenate([np.diff(part["offsets"]) for part in found])
        self.offsets = np.cumsum([0, *lengths])
        self.pooled_NxD = np.concatenate([part["pooled_NxD"] for part in found])
        self.questions = source.questions()
        self.queries = {name: dict(np.load(cache / f"queries_{name}.npz")) for name in self.questions}
        # MedQuAD's questions are sorted by source: an index would be tuned on one kind and asked another.
        order = np.random.default_rng(0).permutation(len(self.questions["medquad"]))
        self.questions["medquad"] = [self.questions["medquad"][at] for at in order]
        self.queries["medquad"] = in_order(self.queries["medquad"], order)

    def rows(self, rows: np.ndarray) -> TokenVectors:
        """Token vectors of passages, padded."""
        v = np.zeros((len(rows), source.PASSAGE_LENGTH, source.DIM), np.float16)
        keep = np.zeros(v.shape[:2], bool)
        for at, row in enumerate(rows):
            tokens = self.tokens_TxC[self.offsets[row] : self.offsets[row + 1]]
            v[at, : len(tokens)], keep[at, : len(tokens)] = tokens, True
        return TokenVectors(v, keep)

    def encode_rows(self, rows: np.ndarray) -> Iterator[TokenVectors]:
        """Token vectors of passages, a piece at a time."""
        for first in range(0, len(rows), PIECE):
            yield self.rows(rows[first : first + PIECE])

    def pieces(self) -> Iterator[TokenVectors]:
        """The whole corpus."""
        return self.encode_rows(np.arange(len(self.passages)))

    def q(self, name: str) -> np.ndarray:
        """Token vectors of a set of questions, float32 [n, Q, C], zero where there is no token."""
        flat, offsets = self.queries[name]["tokens_TxC"], self.queries[name]["offsets"]
        out = np.zeros((len(offsets) - 1, source.QUERY_LENGTH, source.DIM), np.float32)
        for at in range(len(out)):
            out[at, : offsets[at + 1] - offsets[at]] = flat[offsets[at] : offsets[at + 1]]
        return out

    def truth(self, name: str, questions: int, cache: Path) -> np.ndarray:
        """The TOP best rows by exact MaxSim of the first questions of a set, kept in the cache."""
        path = cache / f"truth_{name}_mixed_{len(self.passages)}_{questions}.npy"
        if not path.exists():
            search = ExactSearch(self.q(name)[:questions], TOP)
            for number, piece in enumerate(self.pieces()):
                search.add(piece, number * PIECE)
            np.save(path, search.result()[0])
        return np.load(path)


def in_order(queries: dict[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of questions, rearranged."""
    tokens = np.split(queries["tokens_TxC"], queries["offsets"][1:-1])
    return {
        "tokens_TxC": np.concatenate([tokens[at] for at in order]),
        "offsets": np.cumsum([0, *np.diff(queries["offsets"])[order]]),
        "pooled_NxD": queries["pooled_NxD"][order],
    }


class Peers:
    """Systems of another process, fed the same arrays; the first questions are for tuning.

    Args:
      python: of its environment.
      world: corpus and questions.
      folder: for the arrays.
      first: question that is asked as number 0.
      script: what to run; None: ``retrieval_peers.py``.
      environment: of the process; None: this one's.
    """

    def __init__(
        self,
        python: str,
        world: World,
        folder: Path,
        first: int,
        script: Path | None = None,
        environment: dict[str, str] | None = None,
    ):
        queries = world.queries["medquad"]
        start = queries["offsets"][first]
        arrays = {
            "tokens": world.tokens_TxC,
            "offsets": world.offsets,
            "pooled": world.pooled_NxD,
            "queries": queries["tokens_TxC"][start:],
            "query_offsets": queries["offsets"][first:] - start,
            "pooled_queries": queries["pooled_NxD"][first:],
            "tuning": queries["tokens_TxC"][:start],
            "tuning_offsets": queries["offsets"][: first + 1],
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        command = [python, str(script or Path(__file__).with_name("retrieval_peers.py")), str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peers' process ended; see its output above")
        return json.loads(line)

    def search(self, name: str) -> Search:
        """A system of the other process; the time is its own."""

        def timed(first: int, last: int) -> tuple[np.ndarray, float]:
            answer = self.ask(search=name, first=first, last=last)
            return np.array(answer["rows"]), answer["seconds"]

        return timed


def ours(world: World, cfg: IndexConfig, recalls: list[float], folder: Path) -> tuple[list[Any], float, int]:
    """Our index, built and saved, then opened and tuned to each recall; with build seconds and bytes.

    It is tuned on questions that are not measured.
    """
    start = time.perf_counter()
    index = build_index(
        world.encode_rows,
        len(world.passages),
        cfg,
        model_fingerprint="minilm",
        corpus_fingerprint="medquad",
        sample_q_NxQxC=world.q("medquad")[:TUNING],
        ann_recall_at=(TOP,),
    )
    assert index.curve is not None
    print(f"built, tuned and measured in {time.perf_counter() - start:.0f} s")
    for full in (False, True):
        best = max(
            (p for p in index.curve.points if full == (p.scored == p.hits)), key=lambda p: (p.ann_recall, -p.hits)
        )
        print(f"at most, {'all' if full else 'some'} in full: {best}")
    print(f"a hit scored in full costs {full_cost(index.curve.points):.1f} times one scored by centroids", flush=True)
    index.save(folder)
    opened = open_index(folder, "minilm", "medquad")
    chosen = [cheapest(index.curve.points, recall) for recall in recalls]
    tuned = [opened.searcher.tuned(point.hits, point.leaves, point.spare) for point in chosen]
    print("\n".join(f"tuned to {recall:g}: {point}" for recall, point in zip(recalls, chosen, strict=True)), flush=True)
    return tuned, opened.card.build_seconds, opened.card.total_bytes


def full_cost(points: list[Point]) -> float:
    """Time to score a hit in full over that to score it by its centroids, from the points with the most hits."""
    most = max(point.hits for point in points)
    last = sorted((p for p in points if p.hits == most and p.leaves == points[-1].leaves), key=lambda p: p.scored)
    few, some, every = last[0], last[-2], last[-1]  # the last one scores no hit by its centroids alone
    full = (some.ms - few.ms) / (some.scored - few.scored)
    rough = (some.ms - every.ms + full * (every.scored - some.scored)) / most
    return full / rough


def quality(world: World, index: Any, bm25: BM25, truth: np.ndarray) -> list[dict[str, Any]]:
    """nDCG@10 and recall@k of the rankings of both sets of questions, each with its interval of 95%.

    LiveQA: graded judgements (gain = grade), recall of passages graded 2 or 3, over questions that have one. Only what
    systems of 2017 had found was judged: ``judged@10`` is the share of a ranking's first ten that anyone has looked at,
    and what nobody has counts as wrong.
    MedQuAD: a question's own answer passages, over the questions that ``truth`` ranks.
    """
    grades: dict[str, dict[int, int]] = {}
    for line in (source.DATA / "qrels.tsv").read_text().splitlines():
        query, _, passage, grade = line.split()
        if passage in world.row:
            grades.setdefault(query, {})[world.row[passage]] = int(grade)
    rows_out = []
    for name, asked in world.questions.items():
        texts = [source.query_text(question) for question in asked]
        if name == "liveqa":
            gold = [grades.get(question["id"], {}) for question in asked]
            right = [{row for row, g in one.items() if g >= 2} for one in gold]
            use = [at for at, one in enumerate(right) if one]
        else:
            right = [{world.row[d] for d in question["answer_doc_ids"] if d in world.row} for question in asked]
            gold = [dict.fromkeys(one, 1) for one in right]
            use = [at for at, one in enumerate(right) if one and TUNING <= at < TUNING + len(truth)]
        q, pooled = world.q(name)[use], world.queries[name]["pooled_NxD"][use]
        words, _ = bm25.search([texts[at] for at in use], 100)
        mine, _ = index.search(q, 100)
        if name == "liveqa":
            search = ExactSearch(q, TOP)
            for number, piece in enumerate(world.pieces()):
                search.add(piece, number * PIECE)
            exact = search.result()[0]
        else:
            exact = truth[np.array(use) - TUNING]
        rankings = {
            "BM25": words,
            "pooled MiniLM": np.argsort(-(pooled @ world.pooled_NxD.T), axis=1)[:, :TOP],
            "exact MaxSim": exact,
            "ours": mine,
            "hybrid (ours + BM25)": reciprocal_rank({"ours": mine, "bm25": words}, TOP)[0],
        }
        for system, rows in rankings.items():
            row: dict[str, Any] = {"questions": name, "n": len(use), "system": system}
            each = {"ndcg@10": [ndcg(r, gold[at]) for r, at in zip(rows, use, strict=True)]}
            for k in (1, 5, 10, TOP):
                each[f"recall@{k}"] = [
                    len(right[at] & set(r[:k].tolist())) / len(right[at]) for r, at in zip(rows, use, strict=True)
                ]
            if name == "liveqa":
                each["judged@10"] = [
                    float(np.mean([r in gold[at] for r in one[:10].tolist()]))
                    for one, at in zip(rows, use, strict=True)
                ]
            for measure_name, values in each.items():
                found = bootstrap_interval(values)
                row[measure_name] = [round(x, 4) for x in (float(np.mean(values)), found.low, found.high)]
            rows_out.append(row)
    return rows_out


def ndcg(rows: np.ndarray, grades: dict[int, int], k: int = 10) -> float:
    """nDCG@k with gain = grade; unjudged passages gain nothing."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    got = np.array([grades.get(int(row), 0) for row in rows[:k]], float)
    best = np.array(sorted(grades.values(), reverse=True)[:k], float)
    return float(got @ discount[: len(got)] / (best @ discount[: len(best)]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--json", type=Path, help="one row a system")
    parser.add_argument("--quality", type=Path, help="nDCG and recall on judgements; without it they are not computed")
    parser.add_argument("--peers", help="python of the environment of retrieval_peers.py; without it ours alone")
    parser.add_argument("--parts", type=int, help="parts of 1,024 passages; default: all")
    ours_default = [f"{IndexConfig().bits}:0.96"]  # a little above the goal: other questions find a little less
    parser.add_argument("--ours", nargs="+", default=ours_default, metavar="BITS:RECALL,...", help="settings of ours")
    parser.add_argument(
        "--plaid",
        nargs="+",
        default=["2:4096:8", "2:1024:4"],
        metavar="BITS:SCORED:PROBED",
        help="settings of fast-plaid: bits of its code, passages scored in full, lists probed",
    )
    parser.add_argument("--batch", type=int, default=128, help="questions in a batch")
    parser.add_argument("--single", type=int, default=25, help="questions asked one at a time")
    parser.add_argument("--exact", type=int, default=16, help="questions of the exact search, in its one batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("index", nargs="*", help="overrides of the index: rerank=4000")
    args = parser.parse_intermixed_args()
    world = World(args.cache, args.parts)
    questions = world.q("medquad")[TUNING : TUNING + args.batch]
    texts = [source.query_text(q) for q in world.questions["medquad"][TUNING : TUNING + args.batch]]
    truth = world.truth("medquad", TUNING + args.batch, args.cache)[TUNING:]
    print(f"{len(world.passages):,} passages, {len(world.tokens_TxC):,} tokens, {len(questions)} questions measured")
    systems: dict[str, Search] = {}
    costs: dict[str, tuple[float, int]] = {}
    overrides = dict(pair.split("=", 1) for pair in args.index)
    if {"bits", "ann_recall"} & overrides.keys():
        parser.error("bits and recall of ours are given by --ours BITS:RECALL")
    index: Any = None
    with tempfile.TemporaryDirectory() as scratch:
        for setting in args.ours:
            bits, recalls = float(setting.split(":")[0]), [float(r) for r in setting.split(":")[1].split(",")]
            cfg = IndexConfig.model_validate({"kind": "scann", **overrides, "bits": bits, "ann_recall": recalls[0]})
            tuned, seconds, size = ours(world, cfg, recalls, Path(scratch) / setting)
            for recall, index in zip(recalls, tuned, strict=True):
                name = f"ours, {bits:g} bits, tuned to {recall:g}"
                systems[name] = local(lambda a, b, index=index: index.search(questions[a:b], TOP)[0])
                costs[name] = seconds, size
        start = time.perf_counter()
        bm25 = BM25([source.text_of(passage) for passage in world.passages])
        built = time.perf_counter() - start
        systems["BM25"] = local(lambda a, b: bm25.search(texts[a:b], TOP)[0])
        costs["BM25"] = built, size_of(bm25, Path(scratch) / "bm25")
        if args.peers:
            peers = Peers(args.peers, world, args.cache / f"peers_{len(world.passages)}", TUNING)
            wanted: dict[str, dict[str, Any]] = {"FAISS IVF, pooled": {}}
            for setting in args.plaid:
                nbits, full, probe = (int(part) for part in setting.split(":"))
                knobs = {"nbits": nbits, "n_full_scores": full, "n_ivf_probe": probe}
                wanted[f"fast-plaid, {nbits} bits, {full} scored, {probe} probed"] = {"plaid": knobs}
            for name, how in wanted.items():
                answer = peers.ask(open=name, **how)
                systems[name] = peers.search(name)
                costs[name] = answer["build_seconds"], answer["bytes"]
        found = measure(systems, len(questions), min(args.single, len(questions)), args.rounds)
        if args.exact:
            everything = TokenVectors(*(np.concatenate(x) for x in zip(*map(arrays, world.pieces()), strict=True)))
            exact = ExactIndex(everything)
            slow = {"exact MaxSim": local(lambda a, b: exact.search(questions[a:b], TOP)[0])}
            found |= measure(slow, min(args.exact, len(questions)), min(4, args.exact), 1)
            costs["exact MaxSim"] = 0.0, world.tokens_TxC.nbytes + world.offsets.nbytes
        rows = []
        for name, one in found.items():
            ranking = one.pop("rows")
            recall = round(ann_recall(truth[: len(ranking)], ranking), 4)
            row = {"system": name, "ann_recall@30": recall, **one}
            rows.append(row | {"build_seconds": round(costs[name][0], 2), "bytes": costs[name][1]})
            print(json.dumps(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        if args.quality:
            judged = quality(world, index, bm25, truth)
            args.quality.write_text(json.dumps(judged, indent=1) + "\n")
            print("\n".join(json.dumps(row) for row in judged))


if __name__ == "__main__":
    main()
