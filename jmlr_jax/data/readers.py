"""Reads question sets and corpora from files into Question and Passage records.

A bad record raises :class:`RecordError` naming file, line, field and what was expected; with ``on_error="skip"`` it is
counted and listed in the :class:`ReadReport` instead. What makes the rest of a file unreadable (wrong encoding, an open
quote, a missing column) stops the reading in either mode.

Plain formats, for everything that is not published in one of its own:

* questions, JSONL: ``question``; ``answer``; optional ``id``, ``options`` (object ``{"A": ...}`` or list; without it
  the answer is free text), ``gold_doc_ids`` (list), ``kind``, ``meta`` (object). The answer is the letter of an option,
  or, with a list, also its text.
* questions, CSV and TSV with a header: ``question``, ``answer``; optional ``id``, ``kind``, ``gold_doc_ids`` (joined by
  ``|``), and the options in columns ``A`` to ``J`` or ``option_a`` to ``option_j``, unused ones empty.
* passages: ``text``, ``id``; optional ``title``, ``source``, ``url``; as JSONL, CSV or TSV, told by the file's suffix.

Ids default to ``<file stem>-<line>`` for questions. Fields not named here are ignored and counted in the report.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from etils import epath

from jmlr_jax.data import fields, published
from jmlr_jax.data.schema import LETTERS, FieldError, InputError, Passage, Question, RecordError

OnError = Literal["stop", "skip"]
Format = Literal["medqa", "medmcqa", "mmlu", "pubmedqa", "mirage", "jsonl", "csv", "tsv"]
Record = TypeVar("Record", Question, Passage)

_QUESTION_FIELDS = {"id", "question", "options", "answer", "gold_doc_ids", "kind", "meta"}
_PASSAGE_FIELDS = {"id", "title", "text", "source", "url"}
_CELL_LIMIT = 1 << 30  # the csv module refuses cells above 128 KiB, which whole documents exceed


@dataclass
class ReadReport:
    """What became of a file's records."""

    file: str
    read: int = 0
    skipped: list[RecordError] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)


@dataclass
class ReadResult:
    """Questions of one file, the passages that came with them (PubMedQA), and the report."""

    questions: list[Question]
    passages: list[Passage]
    report: ReadReport


def read_questions(form: Format, path: str, on_error: OnError = "stop") -> ReadResult:
    """Reads one split of a question set.

    Args:
        form: the file's format. ``mmlu`` also takes a directory of ``*.csv``, one file a subject.
        path: anything ``etils.epath`` opens.
        on_error: ``stop`` raises on the first bad record, ``skip`` lists it in the report.

    Raises:
        FileNotFoundError: if there is no such file.
        RecordError: see the module's description.
    """
    report = ReadReport(path)
    passages: list[Passage] = []
    stem = epath.Path(path).stem

    if form in ("medqa", "medmcqa", "jsonl"):
        parse = {"medqa": published.medqa, "medmcqa": published.medmcqa}.get(form)

        def from_json(line: int, value: str) -> Question:
            record = fields.json_object(value)
            if parse:
                return parse(record, f"{stem}-{line:05d}")
            report.ignored_fields.update(record.keys() - _QUESTION_FIELDS)
            return _plain_question(record, f"{stem}-{line:05d}")

        return ReadResult(_collect(_lines(path), from_json, on_error, report), passages, report)

    if form in ("csv", "tsv"):
        rows = _table(path, "\t" if form == "tsv" else ",", ("question", "answer"))

        def from_table(line: int, value: dict[str, str]) -> Question:
            record = _options_of_columns(value)
            report.ignored_fields.update(record.keys() - _QUESTION_FIELDS)
            return _plain_question(record, f"{stem}-{line:05d}")

        return ReadResult(_collect(rows, from_table, on_error, report), passages, report)

    if form == "mmlu":
        return _read_mmlu(path, on_error)

    if form == "pubmedqa":

        def from_entry(_: int, value: tuple[str, Any]) -> Question:
            question, contexts = published.pubmedqa(*value)
            passages.extend(contexts)
            return question

        return ReadResult(_collect(_json_entries(path, 1), from_entry, on_error, report), passages, report)

    if form == "mirage":
        entries = _json_entries(path, 2)
        questions = _collect(entries, lambda _, value: published.mirage(*value), on_error, report)
        return ReadResult(questions, passages, report)

    raise ValueError(f"unknown question format {form!r}")


def read_corpus(path: str, on_error: OnError = "stop") -> tuple[list[Passage], ReadReport]:
    """Reads passages (or documents) from ``.jsonl``, ``.csv`` or ``.tsv``; raises like :func:`read_questions`."""
    report = ReadReport(path)
    suffix = epath.Path(path).suffix

    def passage(record: fields.Raw) -> Passage:
        report.ignored_fields.update(record.keys() - _PASSAGE_FIELDS)
        rest = {name: fields.optional_text(record, name) for name in ("title", "source", "url")}
        return Passage(id=fields.text(record, "id"), text=fields.text(record, "text"), **rest)

    if suffix == ".jsonl":
        lines = _lines(path)
        return _collect(lines, lambda _, value: passage(fields.json_object(value)), on_error, report), report
    if suffix in (".csv", ".tsv"):
        rows = _table(path, "\t" if suffix == ".tsv" else ",", ("id", "text"))
        return _collect(rows, lambda _, value: passage(value), on_error, report), report
    raise InputError(f"{path}: a corpus is a .jsonl, .csv or .tsv file, not {suffix or 'a file without suffix'!r}")


def _collect(
    rows: Iterable[tuple[int, Any]], parse: Callable[[int, Any], Record], on_error: OnError, report: ReadReport
) -> list[Record]:
    """Parses every row, gives errors their place, and refuses an id seen before."""
    records: list[Record] = []
    line_of: dict[str, int] = {}
    for line, value in rows:
        try:
            if isinstance(value, FieldError):
                raise value
            record = parse(line, value)
            if record.id in line_of:
                raise FieldError("id", f"an id of its own (line {line_of[record.id]} has it already)", record.id)
        except FieldError as error:
            placed = error.at(report.file, line)
            if on_error == "stop" or isinstance(error, published.CopyError):
                raise placed from None
            report.skipped.append(placed)
            continue
        line_of[record.id] = line
        records.append(record)
    report.read = len(records)
    return records


def _lines(path: str, *, keep_blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, a byte-order mark removed."""
    with epath.Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RecordError(path, number, "(line)", "UTF-8 text", raw[error.start : error.start + 8]) from None
            if keep_blank or line.strip():
                yield number, line


def _cells(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with the line each begins at; quoted cells may hold newlines."""
    csv.field_size_limit(_CELL_LIMIT)
    reader = csv.reader((line for _, line in _lines(path, keep_blank=True)), delimiter=delimiter, strict=True)
    begin = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RecordError(path, begin, "(row)", "closed quotes and plain cells", str(error)) from None
        if cells:
            yield begin, cells
        begin = reader.line_num + 1


def _table(path: str, delimiter: str, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str] | FieldError]]:
    """Rows of a CSV file with a header as dicts; a row of the wrong width is yielded as its error."""
    rows = _cells(path, delimiter)
    header_line, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    for name in required:
        if name not in header:
            raise RecordError(path, header_line, name, "a column of this name in the header", header)
    if len(set(header)) < len(header):
        raise RecordError(path, header_line, "(header)", "each column once", header)
    for line, cells in rows:
        if len(cells) != len(header):
            yield line, FieldError("(row)", f"{len(header)} cells as in the header", cells)
        else:
            yield line, dict(zip(header, cells, strict=True))


def _read_mmlu(path: str, on_error: OnError) -> ReadResult:
    """One subject's file, or every ``*.csv`` of a directory."""
    root = epath.Path(path)
    files = sorted(root.glob("*.csv")) if root.is_dir() else [root]
    if not files:
        raise FileNotFoundError(f"{path}: no *.csv in this directory")
    result = ReadResult([], [], ReadReport(path))
    for file in files:
        subject = re.sub(r"_(test|dev|val)$", "", file.stem)
        report = ReadReport(str(file))
        rows = ((line, (cells, subject, number)) for number, (line, cells) in enumerate(_cells(str(file), ",")))
        result.questions += _collect(rows, lambda _, value: published.mmlu(*value), on_error, report)
        result.report.read += report.read
        result.report.skipped += report.skipped
    return result


def _json_entries(path: str, depth: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Entries ``(key, ..., value)`` of nested JSON objects, ``depth`` keys deep, with the line of the last key."""
    content = "".join(line for _, line in _lines(path, keep_blank=True))

    def line_at(position: int) -> int:
        return content.count("\n", 0, position) + 1

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            places = [match.start() for match in re.finditer(re.escape(json.dumps(repeated[0])) + r"\s*:", content)]
            raise RecordError(path, line_at(places[-1]) if places else 1, "(key)", "each key once", repeated[0])
        return dict(pairs)

    try:
        root = json.loads(content, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecordError(path, error.lineno, "(file)", f"one JSON object ({error.msg})", "") from None

    position, line = 0, 1

    def walk(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        nonlocal position, line
        if len(keys) == depth:
            yield line, (*keys, value)
            return
        if not isinstance(value, dict):
            raise RecordError(path, line, "/".join(keys) or "(file)", "a JSON object", value)
        for key, inner in value.items():
            found = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:").search(content, position)
            if found:  # not if the file escapes the key in another way; the line then stays at the last one found
                line += content.count("\n", position, found.start())
                position = found.start()
            yield from walk(inner, (*keys, key))

    yield from walk(root, ())


def _options_of_columns(row: dict[str, str]) -> dict[str, Any]:
    """A CSV row in the shape of a JSONL record."""
    record: dict[str, Any] = {name: cell for name, cell in row.items() if cell.strip()}
    options: list[str] = []
    for place, letter in enumerate(LETTERS):
        present = [record.pop(name) for name in (letter, f"option_{letter.lower()}") if name in record]
        if len(present) > 1 or (present and place != len(options)):
            raise FieldError(f"option {letter}", "options in one run of columns from A on, each in one column", present)
        options.extend(present)
    if options:
        record["options"] = {LETTERS[i]: option for i, option in enumerate(options)}
    if "gold_doc_ids" in record:
        record["gold_doc_ids"] = [part.strip() for part in record["gold_doc_ids"].split("|") if part.strip()]
    return record


def _plain_question(record: fields.Raw, default_id: str) -> Question:
    """A question from the plain JSONL format."""
    meta = fields.an_object("meta", record.get("meta") or {})
    given = record.get("options")
    answer = fields.text(record, "answer")
    index = -1
    options: tuple[str, ...] = ()
    if isinstance(given, list):
        options = tuple(option.strip() for option in fields.texts(record, "options"))
        index = _listed_answer(answer, options)
    elif given is not None:
        options = fields.lettered_options(record)
        index = fields.letter_index(record, "answer", options)
    return Question(
        id=fields.optional_text(record, "id") or default_id,
        question=fields.text(record, "question"),
        options=options,
        answer=options[index] if options else answer,
        answer_index=index,
        gold_doc_ids=fields.texts(record, "gold_doc_ids"),
        kind=fields.optional_text(record, "kind") or str(meta.get("kind", "")),
        meta={name: item if isinstance(item, str) else json.dumps(item) for name, item in meta.items()},
    )


def _listed_answer(answer: str, options: tuple[str, ...]) -> int:
    """Place of the answer given as letter or text; the two readings must not disagree."""
    readings = {place for place, option in enumerate(options) if option == answer}
    if len(answer) == 1 and answer in LETTERS[: len(options)]:
        readings.add(LETTERS.index(answer))
    if len(readings) != 1:
        raise FieldError("answer", "the letter or the text of exactly one option", answer)
    return readings.pop()
