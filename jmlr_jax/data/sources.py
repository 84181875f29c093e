"""From files (or the embedded world) to clean records: read, split long documents, resolve gold ids, filter leaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jmlr_jax.config import Config
from jmlr_jax.data.leakage import LeakageReport, filter_leaks
from jmlr_jax.data.readers import Place, ReadReport, read_corpus, read_questions
from jmlr_jax.data.schema import SPLITS, InputError, Passage, Question
from jmlr_jax.data.split import split_corpus
from jmlr_jax.files import any_path

Questions = dict[str, list[Question]]


@dataclass
class Sources:
    """What was read, before anything is tokenised; ``notes`` goes into the card."""

    questions: Questions
    passages: list[Passage]
    leakage: LeakageReport
    notes: dict[str, Any]


def read_sources(cfg: Config) -> Sources:
    """Questions by split and filtered passages of a configuration.

    Passages come from ``data.corpus_path``; without it from the world, or from what PubMedQA and
    BioASQ give to each question.

    Raises:
        RecordError: a record that cannot be read.
        InputError: no questions, no passages, or an id used twice.
        FileNotFoundError: an input file is not there.
    """
    data = cfg.data
    notes: dict[str, Any] = {"read": []}
    questions: Questions = {split: [] for split in SPLITS}
    documents: list[Passage] = []
    asked_at: dict[str, Place] = {}
    if data.questions == "world":
        from jmlr_jax.data.world import make_world

        world = make_world(data.world, cfg.seed)
        questions |= {split: list(records) for split, records in world.questions.items()}
        documents = list(world.passages)
        notes["world"] = world.stats
    else:
        for split in SPLITS:
            path = getattr(data, f"{split}_path")
            if path is None:
                continue
            path = _existing(f"data.{split}_path", path)
            result = read_questions(data.questions, path, data.on_error, tsv_quotes=data.tsv_quotes)
            if both := asked_at.keys() & result.report.places.keys():
                id_ = min(both)
                (file, line), (other, before) = result.report.places[id_], asked_at[id_]
                raise InputError(f"{file}:{line}: the question id {id_!r} stands in {other}:{before} already")
            asked_at |= result.report.places
            questions[split] = result.questions
            documents += result.passages
            notes["read"].append(_read_notes(result.report))
        if data.corpus_path is not None:
            path = _existing("data.corpus_path", data.corpus_path)
            documents, report = read_corpus(path, data.on_error, tsv_quotes=data.tsv_quotes)
            notes["read"].append(_read_notes(report))
    if not any(questions.values()):
        raise InputError("no questions: set data.train_path, data.dev_path or data.test_path")
    if not documents:
        raise InputError(f"no passages: data.questions={data.questions} has none of its own, set data.corpus_path")

    passages, pieces_of = split_corpus(documents, data.passage_words)
    questions = {split: [with_pieces(question, pieces_of) for question in questions[split]] for split in SPLITS}
    known = {passage.id for passage in passages}
    missing = sum(
        doc not in known for split in SPLITS for question in questions[split] for doc in question.gold_doc_ids
    )
    notes |= {"documents": len(documents), "documents_split": len(pieces_of), "gold_ids_not_in_corpus": missing}
    kept, leakage = filter_leaks(passages, questions, data.leakage_ngram)
    if not kept:
        raise InputError(f"data.leakage_ngram={data.leakage_ngram} removed every passage; raise it, or 0 for no filter")
    return Sources(questions, kept, leakage, notes)


def with_pieces(question: Question, pieces_of: Mapping[str, list[str]]) -> Question:
    """A gold document that was split stands for all its pieces."""
    if not any(doc in pieces_of for doc in question.gold_doc_ids):
        return question
    gold = tuple(piece for doc in question.gold_doc_ids for piece in pieces_of.get(doc, [doc]))
    return dataclasses.replace(question, gold_doc_ids=gold)


def _read_notes(report: ReadReport) -> dict[str, Any]:
    return {
        "file": report.file,
        "read": report.read,
        "outside": report.outside,
        "skipped": [str(error) for error in report.skipped],
        "ignored_fields": dict(sorted(report.ignored_fields.items())),
    }


def _existing(key: str, path: str) -> str:
    if not any_path(path).exists():
        raise FileNotFoundError(f"{key}={path}: no such file")
    return path
