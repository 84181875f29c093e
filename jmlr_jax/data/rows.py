"""Reads files of records into numbered rows: lines, cells of CSV and TSV, entries of JSON.

A line ends at a newline and nowhere else: form feeds, U+2028 and their like are text. Bytes that are not UTF-8 come
through as surrogates, so that whoever takes the row apart can say which field they stand in (``fields.check_text``).
What leaves the rest of a file without meaning raises RecordError here; what is wrong with one row is yielded as its
FieldError.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jmlr_jax.data.schema import FieldError, RecordError
from jmlr_jax.files import any_path

CELL_LIMIT = 1 << 30  # the csv module refuses cells above 128 KiB, which whole documents exceed
_OR_QUOTES = "data.tsv_quotes=true reads cells in quotes, over several lines"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_lines(path: str, *, keep_blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file with their ends, a byte-order mark removed."""
    with any_path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1 and raw.startswith(_UTF16):
                raise RecordError(path, 1, "(file)", "UTF-8 text, this is UTF-16; convert it", raw[:2])
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
            if keep_blank or line.strip():
                yield number, line


def read_cells(path: str, delimiter: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Rows of cells with the line each begins at.

    Args:
        quoted: cells in double quotes may hold delimiters and newlines; otherwise quotes are text and a row is a line.
    """
    if not quoted:
        for number, line in read_lines(path):
            yield number, line.rstrip("\r\n").split(delimiter)
        return
    csv.field_size_limit(CELL_LIMIT)
    reader = csv.reader((line for _, line in read_lines(path, keep_blank=True)), delimiter=delimiter, strict=True)
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


def read_table(path: str, delimiter: str, *, quoted: bool) -> Iterator[tuple[int, dict[str, str] | FieldError]]:
    """Rows under a header as dicts; a row of the wrong width is yielded as its error.

    The header itself comes first, as a row whose cells are their own names.
    """
    rows = read_cells(path, delimiter, quoted=quoted)
    header_line, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise RecordError(path, header_line, "(header)", "each column once", header)
    yield header_line, dict(zip(header, header, strict=True))
    opened = 0  # line of the row before, if its last cell opens quotes that it does not close
    for line, cells in rows:
        opens = not quoted and cells[-1].startswith('"') and not cells[-1].rstrip().endswith('"')
        if len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif opens or opened:  # which rows belong together is not told, so none after this one can be trusted
            raise RecordError(path, opened or line, "(row)", f"{len(header)} cells in one line ({_OR_QUOTES})", cells)
        else:
            yield line, FieldError("(row)", f"{len(header)} cells as in the header", cells)
        opened = line if opens else 0


def read_entries(path: str, depth: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Entries ``(key, ..., value)`` of nested JSON objects, ``depth`` keys deep, with the line of the last key."""
    content, root = _json(path)
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


def read_list(path: str, name: str) -> Iterator[tuple[int, Any]]:
    """Items of the list that a JSON object holds under ``name``, with the line each begins at."""
    content, root = _json(path)
    items = root.get(name) if isinstance(root, dict) else None
    if not isinstance(items, list):
        raise RecordError(path, 1, name, "a list under this name in a JSON object", type(items).__name__)
    between, decoder = re.compile(r"[\s,:]*"), json.JSONDecoder()

    def after(position: int) -> int:
        found = between.match(content, position)
        return found.end() if found else position

    position, key = content.index("{") + 1, None
    while key != name:
        if key is not None:
            position = decoder.raw_decode(content, position)[1]
        key, position = decoder.raw_decode(content, after(position))
        position = after(position)
    position, line, counted = position + 1, 1, 0
    for item in items:
        position = after(position)
        line, counted = line + content.count("\n", counted, position), position
        yield line, item
        position = decoder.raw_decode(content, position)[1]


def _json(path: str) -> tuple[str, Any]:
    """The text of a file, and the JSON value that it is."""
    content = "".join(line for _, line in read_lines(path, keep_blank=True))

    def line_at(position: int) -> int:
        return content.count("\n", 0, position) + 1

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := repeated_key(pairs):
            places = [match.start() for match in re.finditer(re.escape(json.dumps(repeated)) + r"\s*:", content)]
            raise RecordError(path, line_at(places[-1]) if places else 1, "(key)", "each key once", repeated)
        return dict(pairs)

    try:
        return content, json.loads(content, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecordError(path, error.lineno, "(file)", f"one JSON object ({error.msg})", "") from None
    except RecordError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise RecordError(path, 1, "(file)", f"one JSON object ({error})", "") from None


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The first key of a JSON object that it has twice."""
    if len(dict(pairs)) == len(pairs):
        return None
    return next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
