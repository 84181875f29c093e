"""One parser for each published question format: a raw record in, a Question out, FieldError on anything else.

Formats as released by their authors: MedQA (github.com/jind11/MedQA), MedMCQA (medmcqa.github.io), MMLU
(github.com/hendrycks/test), PubMedQA (github.com/pubmedqa/pubmedqa), MIRAGE (github.com/Teddy-XiongGZ/MIRAGE),
MedXpertQA (huggingface.co/datasets/TsinghuaC3I/MedXpertQA), MMLU-Pro (huggingface.co/datasets/TIGER-Lab/MMLU-Pro, its
records one a line) and the golden files of BioASQ's task B (bioasq.org).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from jmlr_jax.data import fields
from jmlr_jax.data.fields import Raw
from jmlr_jax.data.schema import FieldError, Passage, Question

PUBMEDQA_OPTIONS = ("yes", "no", "maybe")
BIOASQ_OPTIONS = ("yes", "no")
MMLU_PRO_CATEGORIES = ("health", "biology")  # of its fourteen, those that are read
READ = {  # fields that are read; of JSON with answers, the others are for readers
    "medqa": {"question", "answer", "options", "answer_idx", "meta_info"},
    "medmcqa": {"id", "question", "opa", "opb", "opc", "opd", "cop", "subject_name"},
    "pubmedqa": {"QUESTION", "CONTEXTS", "LABELS", "final_decision"},
    "mirage": {"question", "options", "answer", "PMID"},
    "medxpertqa": {"id", "question", "options", "label", "question_type", "images"},
    "mmlu_pro": {"question_id", "question", "options", "answer", "answer_index", "category"},
    "bioasq": {"id", "body", "type", "exact_answer", "snippets"},
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


def medxpertqa(record: Raw, default_id: str) -> Question:
    """A line of MedXpertQA's Text set: ten options, right one ``label``; ``kind`` is Reasoning or Understanding.

    The question's text ends with the list of its options, which is taken away: they are a field of their own.
    """
    if record.get("images"):
        raise FieldError("images", "none: a question of the Text set, since no picture is read", record["images"])
    options = fields.lettered_options(record)
    index = fields.letter_index(record, "label", options)
    return Question(
        id=fields.optional_text(record, "id") or default_id,
        question=re.sub(r"\s*Answer Choices:\s*\(A\).*\Z", "", fields.text(record, "question"), flags=re.DOTALL),
        options=options,
        answer=options[index],
        answer_index=index,
        kind=fields.optional_text(record, "question_type"),
    )


def mmlu_pro(record: Raw) -> Question | None:
    """A record of MMLU-Pro, with 3 to 10 options; None unless it is of :data:`MMLU_PRO_CATEGORIES`, the ``kind``."""
    category = fields.text(record, "category")
    if category not in MMLU_PRO_CATEGORIES:
        return None
    number = record.get("question_id")
    if not isinstance(number, int):
        raise FieldError("question_id", "a number", number)
    options = tuple(text.strip() for text in fields.texts(record, "options"))
    index = fields.letter_index(record, "answer", options)
    if record.get("answer_index", index) != index:
        raise FieldError("answer_index", f"{index}, the place of answer {record['answer']}", record["answer_index"])
    return Question(
        id=f"{category}-{number}",
        question=fields.text(record, "question"),
        options=options,
        answer=options[index],
        answer_index=index,
        kind=category,
    )


def bioasq(value: object) -> tuple[Question, list[Passage]] | None:
    """An item of a golden file; None unless it is a yes/no question.

    The snippets of abstracts that its makers give become passages ``ID-<n>``, gold for the question.
    """
    record = fields.an_object("questions", value)
    if fields.text(record, "type") != "yesno":
        return None
    id_, said = fields.text(record, "id"), record.get("exact_answer")
    answer = said[0] if isinstance(said, list) and len(said) == 1 else said
    answer = answer.strip().lower() if isinstance(answer, str) else answer
    if answer not in BIOASQ_OPTIONS:
        raise FieldError("exact_answer", "yes or no (the files of a running challenge have no answers)", said)
    passages: dict[str, Passage] = {}  # some snippets are given twice
    for snippet in record.get("snippets") or ():
        given = fields.an_object("snippets", snippet)
        text, url = fields.text(given, "text"), fields.optional_text(given, "document")
        passages.setdefault(text, Passage(f"{id_}-{len(passages)}", "", text, source="PubMed", url=url))
    question = Question(
        id=id_,
        question=fields.text(record, "body"),
        options=BIOASQ_OPTIONS,
        answer=answer,
        answer_index=BIOASQ_OPTIONS.index(answer),
        gold_doc_ids=tuple(passage.id for passage in passages.values()),
    )
    return question, list(passages.values())
