"""An exported retriever as an mteb task, beside the search of `jmlr` on the same questions and passages.

    python benchmarks/mteb_scores.py RUN FOLDER --peer PYTHON [--arm jmlr] [--split test] [--limit N]

RUN is the directory of one seed, trained and indexed. FOLDER gets the retriever as `jmlr export` writes it and a
retrieval task in files: the passages of the run, its questions with gold passages, and which is whose. PYTHON is an
interpreter that has mteb, sentence-transformers 6 and torch (an environment of its own): there mteb loads the exported
folder as a MultiVectorEncoder, ranks all passages and scores the ranking (``mteb_task.py``); the ranking of the run's
own index is scored by the same functions. The result is printed, and lies in FOLDER as ``result.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
from exported import exported, opened

from jmlr_jax.answering.retrieval import run_searcher
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import trained_retriever
from jmlr_jax.run.weights import INITIAL

DEPTH = 100  # passages of a question that are ranked


def write_task(run: Run, folder: Path, split: str, limit: int | None) -> list[int]:
    """Writes ``corpus.jsonl``, ``queries.jsonl`` and ``relevant.json``; returns the rows of the questions in it."""
    prepared, prompts = run.prepared, Prompts(run.cfg.retriever, run.cfg.generator)
    corpus = [{"id": passage.id, "text": prompts.retrieved(passage)} for passage in prepared.passages]
    questions = prepared.questions(split)
    rows = [row for row in range(len(questions)) if len(prepared.gold(split, row))][:limit]
    queries = [{"id": questions[row].id, "text": prompts.query(questions[row]).strip()} for row in rows]
    gold = {questions[row].id: [corpus[at]["id"] for at in prepared.gold(split, row).tolist()] for row in rows}
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "relevant.json").write_text(json.dumps({name: dict.fromkeys(ids, 1) for name, ids in gold.items()}))
    return rows


def write_ranking(run: Run, folder: Path, arm: str, split: str, rows: list[int]) -> None:
    """What the run's own index finds, with its scores, in ``ranking.json``."""
    questions = [run.prepared.questions(split)[row] for row in rows]
    with jax.set_mesh(run.mesh):
        searcher = run_searcher(run, trained_retriever(arm) or INITIAL)
        found, scores = searcher.search([q.question for q in questions], DEPTH, options=[q.options for q in questions])
    names = np.array([passage.id for passage in run.prepared.passages])
    ranking = {
        question.id: {str(names[row]): float(score) for row, score in zip(*pair, strict=True) if row >= 0}
        for question, *pair in zip(questions, found, scores, strict=True)
    }
    (folder / "ranking.json").write_text(json.dumps(ranking))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", required=True, help="a Python that has mteb and sentence-transformers 6")
    parser.add_argument("--arm", default="jmlr", choices=("jmlr", "separate", "frozen"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="so many questions, the first")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run = opened(given.run)
    if run.cfg.retriever.importance:
        raise SystemExit("retriever.importance is this project's own: other libraries count every token alike")
    layout = exported(given.run, folder, given.arm) / "pylate"
    write_ranking(run, folder, given.arm, given.split, write_task(run, folder, given.split, given.limit))
    script = Path(__file__).with_name("mteb_task.py")
    subprocess.run([given.peer, str(script), str(folder), str(layout), str(DEPTH)], check=True)
    print((folder / "result.json").read_text())


if __name__ == "__main__":
    main()
