"""One parser for each published question format: a raw record in, a Question out, FieldError on anything else.

Formats as released by their authors: MedQA (github.com/jind11/MedQA), MedMCQA (medmcqa.github.io), MMLU
(github.com/hendrycks/test), PubMedQA (github.com/pubmedqa/pubmedqa) and MIRAGE
(github.com/Teddy-XiongGZ/MIRAGE).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from jmlr_jax.data import fields
from jmlr_jax.data.fields import Raw
from jmlr_jax.data.schema import FieldError, Passage, Question

PUBMEDQA_OPTIONS = ("yes", "no", "maybe")
READ = {  # fields that are read; of JSON with answers, the others are for readers
    "medqa": {"question", "answer", "options", "answer_idx", "meta_info"},
    "medmcqa": {"id", "question", "opa", "opb", "opc", "opd", "cop", "subject_name"},
    "pubmedqa": {"QUESTION", "CONTEXTS", "LABELS", "final_decision"},
    "mirage": {"question", "options", "answer", "PMID"},
}


class CopyError(FieldError):
    """A sign that the whole file means something else; skipping the record would mislabel the others."""


def medqa(record: Raw, default_id: str) -> Question:
    """A line of MedQA's JSONL, with 4 or 5 options, with or without ``metamap_phrases``; it has no ids of its own."""
    options = fields.lettered_options(record)
    index = fields.letter_index(record, "answer_idx", options)
    answer = fields.text(record, "answer")
    if answer != options[index]:
        raise FieldError("answer", f"the text of option {record['answer_idx']}, {options[index]!r}", answer)
    return Question(
        id=default_id,
        question=fields.text(record, "question"),
        options=options,
        answer=answer,
        answer_index=index,
        kind=fields.optional_text(record, "meta_info"),
    )


def medmcqa(record: Raw, default_id: str) -> Question:
    """A line of MedMCQA's JSON lines: options ``opa`` to ``opd``, right one ``cop`` from 1 to 4.

    The published test split has no ``cop``: its records are errors here, and its labels are not public.
    Hugging Face's copy counts ``cop`` from 0, which would shift every answer; a 0 stops the reading in any mode.
    """
    options = tuple(fields.text(record, f"op{letter}") for letter in "abcd")
    index = right_of_four(record.get("cop"))
    return Question(
        id=fields.optional_text(record, "id") or default_id,
        question=fields.text(record, "question"),
        options=options,
        answer=options[index],
        answer_index=index,
        kind=fields.optional_text(record, "subject_name"),
    )


def right_of_four(cop: object) -> int:
    """Place, from 0, of the right option that MedMCQA's ``cop`` names."""
    if str(cop).strip() == "0":
        raise CopyError("cop", "1 to 4 as in the published files (this copy seems to count from 0: add 1)", cop)
    if str(cop).strip() not in ("1", "2", "3", "4"):
        raise FieldError("cop", "the right option, 1 to 4 (the published test split has no labels; use dev)", cop)
    return int(str(cop)) - 1


def mmlu(cells: Sequence[str], id_: str, subject: str) -> Question:
    """A row of an MMLU subject's CSV without header: question, four options, right letter; ``kind`` is the subject."""
    if len(cells) != 6:
        raise FieldError("(row)", "6 cells: question, four options, answer letter", list(cells))
    names = ("question", "option A", "option B", "option C", "option D", "answer")
    record = dict(zip(names, cells, strict=True))
    options = tuple(fields.text(record, name) for name in names[1:5])
    index = fields.letter_index(record, "answer", options)
    return Question(
        id=id_,
        question=fields.text(record, "question"),
        options=options,
        answer=options[index],
        answer_index=index,
        kind=subject,
    )


def pubmedqa(pmid: str, value: object) -> tuple[Question, list[Passage]]:
    """An entry of ``ori_pqal.json``; the abstract's sections become passages ``PMID<id>-<n>``, gold for the question.

    ``LONG_ANSWER``, the abstract's conclusion, is left out of the passages: it states the answer.
    """
    record = fields.an_object(pmid, value)
    decision = fields.text(record, "final_decision")
    if decision not in PUBMEDQA_OPTIONS:
        raise FieldError("final_decision", "yes, no or maybe", decision)
    contexts, labels = fields.texts(record, "CONTEXTS"), fields.texts(record, "LABELS")
    if labels and len(labels) != len(contexts):
        raise FieldError("LABELS", f"one label for each of the {len(contexts)} CONTEXTS", len(labels))
    passages = [
        Passage(
            id=f"PMID{pmid}-{i}",
            title=labels[i].capitalize() if labels else "",
            text=context,
            source="PubMed",
            url=f"https://pubmed.ncbi.nlm.nih.gov/{pmid}/",
        )
        for i, context in enumerate(contexts)
    ]
    question = Question(
        id=pmid,
        question=fields.text(record, "QUESTION"),
        options=PUBMEDQA_OPTIONS,
        answer=decision,
        answer_index=PUBMEDQA_OPTIONS.index(decision),
        gold_doc_ids=tuple(passage.id for passage in passages),
    )
    return question, passages


def mirage(dataset: str, key: str, value: object) -> Question:
    """An entry of one data set in MIRAGE's ``benchmark.json``; ``kind`` is the data set, which also prefixes the id."""
    record = fields.an_object(key, value)
    options = fields.lettered_options(record)
    index = fields.letter_index(record, "answer", options)
    return Question(
        id=f"{dataset}/{key}",
        question=fields.text(record, "question"),
        options=options,
        answer=options[index],
        answer_index=index,
        kind=dataset,
        meta={"pmids": json.dumps(record["PMID"])} if "PMID" in record else {},
    )
