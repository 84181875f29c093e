"""A part of MedQuAD, so that real models can be compared within an hour or two of a small machine.

    python benchmarks/medquad_part.py FOLDER [--data ../shared/data] [--train 960] [--dev 312] [--test 312]
        [--passages 6000]

FOLDER gets train.jsonl, dev.jsonl, test.jsonl and corpus.jsonl: questions spread evenly over each split, their gold
passages, BM25's best five of each dev and test question, and random passages up to the number asked for. Last it prints
the words that point a run of ``medquad_smollm`` at them. Accuracies are those of this smaller corpus, where the right
passage is easier to find than among all 24,599.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jmlr_jax.files import write_text
from jmlr_jax.retrieval.bm25 import BM25

NEAR = 5  # of BM25's, for each dev and test question

Rows = list[dict[str, Any]]


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(rows: Rows, count: int) -> Rows:
    """So many of the rows, evenly spaced: splits are ordered by kind of question."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist()]


def kept(passages: Rows, questions: dict[str, Rows], most: int) -> Rows:
    """The passages of the part, in the order of the corpus."""
    place = {passage["id"]: row for row, passage in enumerate(passages)}
    wanted = {place[doc] for rows in questions.values() for row in rows for doc in row["gold_doc_ids"]}
    asked = [row["question"] for split in ("dev", "test") for row in questions[split]]
    lexical = BM25([f"{passage.get('title', '')} {passage['text']}" for passage in passages])
    wanted |= set(lexical.search(asked, NEAR)[0].reshape(-1).tolist()) - {-1}
    others = np.setdiff1d(np.arange(len(passages)), sorted(wanted))
    wanted |= set(np.random.default_rng(0).permutation(others)[: max(0, most - len(wanted))].tolist())
    return [passages[row] for row in sorted(wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    for split, count in {"train": 960, "dev": 312, "test": 312, "passages": 6000}.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N")
    args = parser.parse_args()
    splits = ("train", "dev", "test")
    questions = {
        split: spread(rows_of(args.data / f"medquad_mcq/{split}.jsonl"), getattr(args, split)) for split in splits
    }
    parts = {**questions, "corpus": kept(rows_of(args.data / "medquad/corpus.jsonl"), questions, args.passages)}
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_text(args.folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{', '.join(f'{len(rows):,} {name}' for name, rows in parts.items())}; give a run")
    print(*(f"data.{name}_path={args.folder / name}.jsonl" for name in parts))


if __name__ == "__main__":
    main()
