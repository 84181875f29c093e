"""Reads question sets and corpora from files into Question and Passage records.

A bad record raises :class:`RecordError` naming file, line, field and what was expected; with ``on_error="skip"`` it is
counted and listed in the :class:`ReadReport` instead. What leaves the rest of a file without meaning (an open quote, a
missing column, JSON that ends too soon) stops the reading in either mode.

Plain formats, for everything that is not published in one of its own:

* questions, JSONL: ``question``; ``answer``; optional ``id``, ``options`` (object ``{"A": ...}`` or list; without it
  the answer is free text), ``gold_doc_ids`` (list), ``kind``, ``meta`` (object).
* questions, CSV and TSV with a header: ``question``, ``answer``; optional ``id``, ``kind``, ``gold_doc_ids`` (joined by
  ``|``), and the options in columns ``A`` to ``J`` or ``option_a`` to ``option_j``, unused ones empty.
* passages: ``text``, ``id``; optional ``title``, ``source``, ``url``; as JSONL, CSV or TSV, told by the file's suffix.

``plain.py`` and ``names.py`` say by what other names and forms these are known. In TSV a row is a line and quotes are
text, as MS MARCO and ColBERT write it, unless ``data.tsv_quotes`` is set. Ids default to ``<file stem>-<line>`` for
questions. Fields of other names are left out and counted in the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jmlr_jax.data import fields, plain, published
from jmlr_jax.data.names import by_known_names
from jmlr_jax.data.rows import read_cells, read_entries, read_lines, read_list, read_table
from jmlr_jax.data.schema import FieldError, InputError, Passage, Question, RecordError
from jmlr_jax.files import any_path

OnError = Literal["stop", "skip"]
Format = Literal[
    "medqa", "medmcqa", "mmlu", "pubmedqa", "mirage", "medxpertqa", "mmlu_pro", "bioasq", "jsonl", "csv", "tsv"
]
Record = TypeVar("Record", Question, Passage)
Place = tuple[str, int]  # file, line


@dataclass
class ReadReport:
    """What became of a file's records; ``places`` says where each id stands, ``outside`` counts what its format holds
    beside the questions that are read: other kinds of BioASQ, other categories of MMLU-Pro."""

    file: str
    read: int = 0
    outside: int = 0
    skipped: list[RecordError] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    places: dict[str, Place] = field(default_factory=dict, repr=False)


@dataclass
class ReadResult:
    """Questions of one file, the passages that came with them (PubMedQA, BioASQ), and the report."""

    questions: list[Question]
    passages: list[Passage]
    report: ReadReport


def read_questions(form: Format, path: str, on_error: OnError = "stop", *, tsv_quotes: bool = False) -> ReadResult:
    """Reads one split of a question set.

    Args:
        form: the file's format. ``mmlu`` also takes a directory of ``*.csv``, one file a subject.
        path: anything :func:`jmlr_jax.files.any_path` opens.
        on_error: ``stop`` raises on the first bad record, ``skip`` lists it in the report.
        tsv_quotes: cells of a TSV file may stand in quotes and then hold tabs and newlines.

    Raises:
        FileNotFoundError: if there is no such file.
        RecordError: see the module's description.
    """
    report = ReadReport(path)
    passages: list[Passage] = []
    stem, ignored = any_path(path).stem, report.ignored_fields

    if form in ("medqa", "medmcqa", "medxpertqa", "mmlu_pro", "jsonl"):
        own = {"medqa": published.medqa, "medmcqa": published.medmcqa, "medxpertqa": published.medxpertqa}
        parse = own.get(form)

        def from_json(line: int, value: str) -> Question | None:
            record, default_id = fields.json_object(value), f"{stem}-{line:05d}"
            if form == "jsonl":
                return plain.question(record, default_id, ignored)
            ignored.update(record.keys() - published.READ[form])
            return published.mmlu_pro(record) if parse is None else parse(record, default_id)

        return ReadResult(_collect(read_lines(path), from_json, on_error, report), passages, report)

    if form in ("csv", "tsv"):
        rows = _table(path, form, tsv_quotes, "question", ("question", "answer"))

        def from_table(line: int, value: dict[str, str]) -> Question:
            fields.check_text(value, "(row)")
            return plain.question(value, f"{stem}-{line:05d}", ignored, joined=True)

        return ReadResult(_collect(rows, from_table, on_error, report), passages, report)

    if form == "mmlu":
        return _read_mmlu(path, on_error)

    if form == "pubmedqa":

        def from_entry(_: int, value: tuple[str, Any]) -> Question:
            fields.check_text(value)
            question, contexts = published.pubmedqa(*value)
            ignored.update(value[1].keys() - published.READ[form])
            passages.extend(contexts)
            return question

        return ReadResult(_collect(read_entries(path, 1), from_entry, on_error, report), passages, report)

    if form == "bioasq":

        def from_golden(_: int, value: Any) -> Question | None:
            fields.check_text(value, "questions")
            found = published.bioasq(value)
            if found is None:
                return None
            ignored.update(value.keys() - published.READ[form])
            if found[0].id not in report.places:
                passages.extend(found[1])
            return found[0]

        return ReadResult(_collect(read_list(path, "questions"), from_golden, on_error, report), passages, report)

    if form == "mirage":

        def from_benchmark(_: int, value: tuple[str, str, Any]) -> Question:
            fields.check_text(value)
            question = published.mirage(*value)
            ignored.update(value[2].keys() - published.READ[form])
            return question

        return ReadResult(_collect(read_entries(path, 2), from_benchmark, on_error, report), passages, report)

    raise ValueError(f"unknown question format {form!r}")


def read_corpus(path: str, on_error: OnError = "stop", *, tsv_quotes: bool = False) -> tuple[list[Passage], ReadReport]:
    """Reads passages (or documents) from ``.jsonl``, ``.csv`` or ``.tsv``; otherwise as :func:`read_questions`."""
    report = ReadReport(path)
    suffix = any_path(path).suffix
    if suffix == ".jsonl":

        def from_json(_: int, value: str) -> Passage:
            return plain.passage(fields.json_object(value), report.ignored_fields)

        return _collect(read_lines(path), from_json, on_error, report), report
    if suffix in (".csv", ".tsv"):

        def from_table(_: int, value: dict[str, str]) -> Passage:
            fields.check_text(value, "(row)")
            return plain.passage(value, report.ignored_fields)

        rows = _table(path, suffix[1:], tsv_quotes, "passage", ("id", "text"))
        return _collect(rows, from_table, on_error, report), report
    raise InputError(f"{path}: a corpus is a .jsonl, .csv or .tsv file, not {suffix or 'a file without suffix'!r}")


def _collect(
    rows: Iterable[tuple[int, Any]], parse: Callable[[int, Any], Record | None], on_error: OnError, report: ReadReport
) -> list[Record]:
    """Parses every row, gives errors their place, and refuses an id seen before; None is not read, but counted."""
    records: list[Record] = []
    for line, value in rows:
        try:
            if isinstance(value, FieldError):
                raise value
            record = parse(line, value)
            if record is None:
                report.outside += 1
                continue
            if record.id in report.places:
                before = report.places[record.id][1]
                raise FieldError("id", f"an id of its own (line {before} has it already)", record.id)
        except FieldError as error:
            placed = error.at(report.file, line)
            if on_error == "stop" or isinstance(error, published.CopyError):
                raise placed from None
            report.skipped.append(placed)
            continue
        report.places[record.id] = (report.file, line)
        records.append(record)
    report.read = len(records)
    return records


def _table(
    path: str, form: str, tsv_quotes: bool, kind: Literal["question", "passage"], required: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str] | FieldError]]:
    """Rows of a CSV or TSV file whose header has the columns that are required."""
    rows = read_table(path, "\t" if form == "tsv" else ",", quoted=form == "csv" or tsv_quotes)
    line, header = next(rows)
    try:
        assert isinstance(header, dict)
        fields.check_text(header, "(header)")
        found, _ = by_known_names(header, kind, Counter())
    except FieldError as error:  # what is wrong with a name is wrong with the whole column
        raise error.at(path, line) from None
    for name in required:
        if name not in found and not (name == "answer" and found.keys() & {"letter", "cop"}):
            raise RecordError(path, line, name, "a column of this name in the header", list(header))
    yield from rows


def _read_mmlu(path: str, on_error: OnError) -> ReadResult:
    """One subject's file, or every ``*.csv`` of a directory.

    Questions are numbered by subject, and those of other splits than ``test``, which is what is published by number,
    have the split in their ids.
    """
    root = any_path(path)
    files = sorted(root.glob("*.csv")) if root.is_dir() else [root]
    if not files:
        raise FileNotFoundError(f"{path}: no *.csv in this directory")
    result = ReadResult([], [], ReadReport(path))
    for file in files:
        subject, split = re.fullmatch(r"(.*?)(?:_(test|dev|val))?", file.stem).groups()  # type: ignore[union-attr]
        begin = f"{subject}-{split}" if split in ("dev", "val") else subject

        def from_row(_: int, value: Any, subject: str = subject, begin: str = begin) -> Question:
            number, cells = value
            fields.check_text(cells, "(row)")
            return published.mmlu(cells, f"{begin}-{number:03d}", subject)

        report = ReadReport(str(file))
        cells = read_cells(str(file), ",", quoted=True)
        rows = ((line, (number, row)) for number, (line, row) in enumerate(cells))
        result.questions += _collect(rows, from_row, on_error, report)
        result.report.read += report.read
        result.report.skipped += report.skipped
        result.report.places |= report.places
    return result
