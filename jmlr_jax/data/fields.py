"""Taking typed fields out of a raw record; every complaint names the field, what was expected and what stood there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jmlr_jax.data.rows import repeated_key
from jmlr_jax.data.schema import LETTERS, MAX_OPTIONS, MIN_OPTIONS, FieldError

Raw = Mapping[str, Any]


def json_object(line: str) -> dict[str, Any]:
    """Parses one line of a JSON-lines file; raises FieldError unless it is an object of valid text, each key once."""
    try:
        value = json.loads(line, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise FieldError("(line)", f"one JSON object ({error.msg} at column {error.colno})", line.strip()) from None
    except FieldError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise FieldError("(line)", f"one JSON object ({error})", line.strip()[:80]) from None
    check_text(value)
    return an_object("(line)", value)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (repeated := repeated_key(pairs)) is not None:
        raise FieldError(ascii(repeated)[1:-1], "each key once", [value for key, value in pairs if key == repeated])
    return dict(pairs)


def check_text(value: Any, name: str = "(line)") -> None:
    """Raises FieldError naming the field of the first text, at any depth, that no file of UTF-8 can hold or should.

    That is half a surrogate pair, as JSON can escape one and as bytes that are not UTF-8 are read, and NUL, at which
    many programs end a text.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise FieldError(name, "text without the character NUL", _around(value, value.index("\0")))
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                what = "UTF-8 text, this has bytes or half a surrogate pair that is none"
                raise FieldError(name, what, _around(value, error.start)) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, name)
            check_text(item, key if name == "(line)" else f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item, name)


def _around(text: str, place: int) -> str:
    return text[max(place - 20, 0) : place + 20]


def an_object(name: str, value: Any) -> dict[str, Any]:
    """``value`` if it is a JSON object, else FieldError."""
    if not isinstance(value, dict):
        raise FieldError(name, "a JSON object", value)
    return value


def text(record: Raw, name: str) -> str:
    """The field as text without outer white space; raises FieldError if it is missing, empty or not text."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(name, "non-empty text", value)
    return value.strip()


def optional_text(record: Raw, name: str) -> str:
    """The field as text; empty if it is missing or null; raises FieldError if it is something else."""
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FieldError(name, "text", value)
    return value.strip()


def texts(record: Raw, name: str) -> tuple[str, ...]:
    """The field as a tuple of texts; empty if missing; raises FieldError if it is not a list of texts."""
    value = record.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FieldError(name, "a list of texts", value)
    return tuple(value)


def lettered_options(record: Raw, name: str = "options") -> tuple[str, ...]:
    """Options of an object ``{"A": text, "B": text, ...}`` in the order of their letters."""
    value = an_object(name, record.get(name))
    letters = tuple(LETTERS[: len(value)])
    if not MIN_OPTIONS <= len(value) <= MAX_OPTIONS or set(value) != set(letters):
        raise FieldError(name, f"{MIN_OPTIONS} to {MAX_OPTIONS} options under the letters A, B, ...", sorted(value))
    for letter in letters:
        if not isinstance(value[letter], str) or not value[letter].strip():
            raise FieldError(f"{name}.{letter}", "non-empty text", value[letter])
    return tuple(value[letter].strip() for letter in letters)


def letter_index(record: Raw, name: str, options: tuple[str, ...]) -> int:
    """Place of the option whose letter stands in the field."""
    value = record.get(name)
    letter = value.strip() if isinstance(value, str) else ""
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise FieldError(name, f"a letter from A to {LETTERS[len(options) - 1]}", value)
    return LETTERS.index(letter)
