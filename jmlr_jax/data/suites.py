"""Published sets of questions that a trained run can be asked, and their way into the run's tokens.

A suite has tasks; each has an accuracy of its own, and the suite's figure is the mean of them. Passages are looked for
with the question alone, without its options. Nothing is left out of a task: a question that does not fit into the
lengths of the run stays in the count, as one that is answered wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jmlr_jax.config import Config
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.builders import write_corpus, write_questions
from jmlr_jax.data.prepare import TableWriter
from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.readers import Format, ReadResult, read_questions
from jmlr_jax.data.schema import InputError, Question
from jmlr_jax.data.sources import with_pieces
from jmlr_jax.data.split import split_corpus
from jmlr_jax.data.tokenizers import encoder, load_tokenizer
from jmlr_jax.files import any_path, digest, write_text

PASSAGES = 32  # that are looked for, as in MIRAGE; read is what fits into generator.max_length
SUITE_CARD = "suite.json"
PLAIN: dict[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv"}


@dataclass(frozen=True)
class Suite:
    """A published set of questions.

    Attributes:
        name: what it is asked for by, and its folder.
        title: what its makers call it.
        form: format of its file; None: plain records, told by the file's suffix.
        tasks: kind of question -> how many were published (0: not known); a single one takes questions of any kind.
        given: what is read instead of passages of the run, where the file itself gives passages.
        others: model -> mean accuracy in percent, as published.
        protocol: how its makers do differently what is done alike for every suite here.
    """

    name: str
    title: str
    form: Format | None
    tasks: Mapping[str, int]
    given: str = ""
    others: Mapping[str, float] = field(default_factory=dict)
    protocol: tuple[str, ...] = ()

    def task(self, kind: str) -> str:
        """The task that a question of this kind belongs to."""
        return kind if len(self.tasks) > 1 else next(iter(self.tasks))


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "mirage",
            "MIRAGE",
            "mirage",
            {"mmlu": 1089, "medqa": 1273, "medmcqa": 4183, "pubmedqa": 500, "bioasq": 618},
            others={
                "SimRAG, Llama-3-8B": 75.55,
                "Orca-3-7B with MedRAG": 64.27,
                "PMC-LLaMA-13B with MedRAG": 52.92,
            },
            protocol=(
                "MIRAGE has its models write step-by-step reasoning and a letter, in JSON, and counts what they write",
                "MIRAGE's script takes A where it finds no letter in an answer; here such an answer is wrong",
                "MIRAGE's figures are of snippets from MedCorp (PubMed, StatPearls, textbooks, Wikipedia), ranked by "
                "four retrievers together",
            ),
        ),
        Suite("medqa", "MedQA (4 or 5 options, as in the file)", "medqa", {"medqa": 1273}),
        Suite("medxpertqa", "MedXpertQA Text", "medxpertqa", {"medxpertqa": 2450}),
        Suite("mmlu_pro", "MMLU-Pro, health and biology", "mmlu_pro", {"health": 818, "biology": 717}),
        Suite("pubmedqa", "PubMedQA without the abstract", "pubmedqa", {"pubmedqa": 500}),
        Suite(
            "pubmedqa_abstract",
            "PubMedQA with the abstract",
            "pubmedqa",
            {"pubmedqa": 500},
            given="the abstract itself",
        ),
        Suite("bioasq", "BioASQ, yes/no questions, without the snippets", "bioasq", {"bioasq": 0}),
        Suite(
            "bioasq_snippets",
            "BioASQ, yes/no questions, with the snippets of abstracts",
            "bioasq",
            {"bioasq": 0},
            given="the snippets that the file gives",
        ),
        Suite("amboss", "AMBOSS, from a file of your own", None, {"amboss": 0}),
    )
}


def read_suite(suite: Suite, path: str) -> ReadResult:
    """Questions of a suite's file.

    Raises:
        RecordError: a record that cannot be read; none is skipped, since it would be missing from the mean.
        InputError: another file than the suite's: a task without questions or a further one, no options.
    """
    form = suite.form or PLAIN.get(any_path(path).suffix)
    if form is None:
        raise InputError(f"{path}: questions of {suite.title} are a {', '.join(PLAIN)} file (docs/tutorial.md)")
    result = read_questions(form, path)
    found = {suite.task(question.kind) for question in result.questions}
    for name in suite.tasks:
        if name not in found:
            raise InputError(f"{path}: no questions of {name}; give the whole file of {suite.title}, as published")
    for question in result.questions:
        line = result.report.places[question.id][1]
        if suite.task(question.kind) not in suite.tasks:
            raise InputError(
                f"{path}:{line}: questions of {suite.task(question.kind)!r}, which {suite.title} does not have; it has "
                f"{', '.join(suite.tasks)}: give the file as published"
            )
        if not question.options:
            raise InputError(f"{path}:{line}: question {question.id} has no options; a suite is multiple choice")
    return result


def suite_digest(suite: Suite, path: str) -> str:
    """Digest of a suite's file; raises InputError if it is not there."""
    if not any_path(path).is_file():
        raise InputError(f"{path}: no such file; --questions names the file of {suite.title}")
    return digest(path)


def write_suite(cfg: Config, prepared: Prepared, suite: Suite, path: str, folder: Path) -> None:
    """Writes a suite in the tokens of a run: a split of the suite's name, and ``suite.json``.

    The card has ``tasks`` (task -> the row of each of its questions in the file's order, -1 where it does not fit),
    ``misfits`` (task -> place among its questions -> ``id why``), ``cuts`` (table -> what was cut), ``max_options``,
    ``in_training`` (ids of questions whose text stands among the run's training questions) and ``file``.

    Args:
        cfg, prepared: of the run.
        path: the file of the suite.
        folder: to be filled.

    Raises:
        RecordError, InputError: see :func:`read_suite`; also where not one question of a task fits.
    """
    result = read_suite(suite, path)
    engines = (
        encoder(load_tokenizer(prepared.tokenizer_dir("retriever"))),
        encoder(load_tokenizer(prepared.tokenizer_dir("generator")), continues=True),
    )
    skip = cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_error": "skip"})})
    asked = Prompts(cfg.retriever.model_copy(update={"query_template": question_only(cfg)}), cfg.generator)
    writer = TableWriter(skip, asked, *engines, prepared.retriever_ids, prepared.generator_ids, folder / "tokens")
    questions, row_of = _asked(suite, result, cfg, writer, folder)
    kept = writer.write_split(suite.name, questions, row_of)
    write_questions(folder, {suite.name: kept})
    rows = {question.id: row for row, question in enumerate(kept)}
    why: dict[str, str] = {}
    for misfit in writer.dropped:
        why.setdefault(misfit.id, str(misfit))
    tasks: dict[str, list[int]] = {name: [] for name in suite.tasks}
    misfits: dict[str, dict[str, dict[str, str]]] = {name: {} for name in suite.tasks}
    for question in questions:
        task = suite.task(question.kind)
        if question.id not in rows:
            misfits[task][str(len(tasks[task]))] = {"id": question.id, "why": why[question.id]}
        tasks[task].append(rows.get(question.id, -1))
    for task, places in tasks.items():
        if max(places) < 0:
            raise InputError(f"{path}: no question of {task} fits, the first: {misfits[task]['0']['why']}")
    card = {
        "suite": suite.name,
        "file": path,
        "tasks": tasks,
        "misfits": misfits,
        "cuts": writer.cuts,
        "max_options": max(len(question.options) for question in kept),
        "in_training": _in_training(prepared, questions),
    }
    write_text(folder / SUITE_CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")


def question_only(cfg: Config) -> str:
    """The run's template of queries without the options."""
    return cfg.retriever.query_template.replace("{options}", "").strip() or "{question}"


def _asked(
    suite: Suite, result: ReadResult, cfg: Config, writer: TableWriter, folder: Path
) -> tuple[list[Question], dict[str, int]]:
    """Questions, and rows of the passages that the file gives where those are what is read; they are written here."""
    if not suite.given:
        return result.questions, {}
    passages, pieces_of = split_corpus(result.passages, cfg.data.passage_words)
    if not passages:
        raise InputError(f"{result.report.file}: gives no passages to its questions; ask --suite {suite.form} instead")
    writer.write_passages(passages)
    write_corpus(folder, passages)
    questions = [with_pieces(question, pieces_of) for question in result.questions]
    return questions, {passage.id: row for row, passage in enumerate(passages)}


def _in_training(prepared: Prepared, questions: Sequence[Question]) -> list[str]:
    """Ids of the questions that the run was trained on, by their text."""
    asked: dict[str, list[str]] = {}
    for question in questions:
        asked.setdefault(_same(question.question), []).append(question.id)
    seen = {text for trained in prepared.questions("train") if (text := _same(trained.question)) in asked}
    return sorted(id_ for text in seen for id_ in asked[text])


def _same(text: str) -> str:
    return " ".join(text.casefold().split())


def read_card(folder: Path) -> dict[str, Any]:
    """The card that :func:`write_suite` wrote into a folder."""
    found: dict[str, Any] = json.loads((folder / SUITE_CARD).read_text(encoding="utf-8"))
    return found
