"""What `jmlr prepare` reports: reading, leaks, cut texts, and how far chance and BM25 get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jmlr_jax.data.leakage import LeakageReport, Overlap
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import Passage, Question

BASELINE_QUESTIONS = 2000  # questions of a split that BM25 is measured on at most, evenly spread
CUTOFFS = (1, 5, 16)  # passages among which a gold one is looked for
_SHOWN = 5


def leakage_notes(report: LeakageReport) -> dict[str, Any]:
    """A leakage report as JSON; every removed passage is listed, of the training overlaps the first few."""

    def listed(overlaps: Sequence[Overlap]) -> list[dict[str, Any]]:
        return [vars(overlap) for overlap in overlaps]

    return {
        "ngram": report.ngram,
        "passages": report.passages,
        "removed": len(report.removed),
        "gold_removed": report.gold_removed,
        "questions_without_gold": list(report.questions_without_gold),
        "removed_passages": listed(report.removed),
        "train_overlaps": len(report.train_overlaps),
        "train_overlap_examples": listed(report.train_overlaps[:_SHOWN]),
    }


def baselines(
    prompts: Prompts,
    questions: Mapping[str, Sequence[Question]],
    passages: Sequence[Passage],
    row_of: Mapping[str, int],
) -> dict[str, Any]:
    """Chance of the right option, and hit@k of any gold passage for random passages and BM25, by split.

    Figures are shares from 0 to 1 over the questions that have a gold passage in the corpus, at most
    ``BASELINE_QUESTIONS`` of a split. Random is the exact expectation of drawing k different passages.
    """
    cutoffs = [k for k in CUTOFFS if k <= len(passages)]
    with_gold: dict[str, list[tuple[Question, set[int]]]] = {}
    result: dict[str, Any] = {}
    for split, records in questions.items():
        chances = [1 / len(question.options) for question in records if question.options]
        pairs = [(q, {row_of[doc] for doc in q.gold_doc_ids if doc in row_of}) for q in records]
        pairs = [(question, gold) for question, gold in pairs if gold]
        with_gold[split] = pairs[:: max(1, -(-len(pairs) // BASELINE_QUESTIONS))]
        result[split] = {"chance": sum(chances) / len(chances) if chances else None, "questions": len(with_gold[split])}
    if not any(with_gold.values()):
        return result

    from jmlr_jax.retrieval.bm25 import BM25

    bm25 = BM25([prompts.retrieved(passage) for passage in passages])
    for split, pairs in with_gold.items():
        if not pairs:
            continue
        rows, _ = bm25.search([prompts.query(question) for question, _ in pairs], max(cutoffs))
        for k in cutoffs:
            found = [not gold.isdisjoint(row[:k].tolist()) for row, (_, gold) in zip(rows, pairs, strict=True)]
            drawn = [random_hit(len(passages), len(gold), k) for _, gold in pairs]
            result[split][f"bm25@{k}"] = float(np.mean(found))
            result[split][f"random@{k}"] = float(np.mean(drawn))
    return result


def random_hit(passages: int, gold: int, k: int) -> float:
    """Probability that k different passages drawn at random hold at least one of the gold ones.

    >>> random_hit(4, 1, 1), random_hit(4, 2, 3)
    (0.25, 1.0)
    """
    return 1 - math.comb(passages - gold, k) / math.comb(passages, k)


def show(card: Mapping[str, Any], console: Console) -> None:
    """Prints the card's statistics as tables."""
    splits = card["baselines"]
    table = Table("", *splits, title="questions", title_justify="left")
    table.add_row("questions", *(f"{card['questions'][split]:,}" for split in splits))
    names = {name for row in splits.values() for name in row if "@" in name}
    for name in ["chance", *sorted(names, key=_by_cutoff)]:
        table.add_row(name, *(_share(row.get(name)) for row in splits.values()))
    console.print(table)

    table = Table(title=f"tokens ({card['passages']:,} passages)", title_justify="left")
    for column in ("table", "rows", "cut", "tokens lost", "longest"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for name, cut in card["cuts"].items():
        table.add_row(name, *(f"{cut[key]:,}" for key in ("rows", "cut", "tokens_lost", "longest")))
    console.print(table)

    if card["documents_split"]:
        console.print(f"{card['documents_split']:,} of {card['documents']:,} documents were split")
    for note in card["read"]:
        if note["skipped"]:
            console.print(f"{note['file']}: {len(note['skipped'])} bad records skipped, first: {note['skipped'][0]}")
        if note["outside"]:
            console.print(f"{note['file']}: {note['outside']:,} questions of other kinds are not read")
        if note["ignored_fields"]:
            console.print(f"{note['file']}: fields not read: {', '.join(note['ignored_fields'])}")
    if card["dropped"]:
        console.print(
            f"{len(card['dropped'])} pieces did not fit and their questions are left out: {card['dropped'][0]}"
        )
    if card["gold_ids_not_in_corpus"]:
        console.print(f"{card['gold_ids_not_in_corpus']:,} gold ids are not in the corpus")
    leakage = card["leakage"]
    if not leakage["ngram"]:
        console.print("leakage filter off (data.leakage_ngram=0)")
        return
    console.print(
        f"leakage ({leakage['ngram']} words in a row): {leakage['removed']:,} of {leakage['passages']:,} passages "
        f"removed, {leakage['gold_removed']:,} of them gold, which leaves {len(leakage['questions_without_gold']):,} "
        f"questions without any; {leakage['train_overlaps']:,} passages overlap training questions and stay"
    )


def _by_cutoff(name: str) -> tuple[str, int]:
    method, k = name.split("@")
    return method, int(k)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"
