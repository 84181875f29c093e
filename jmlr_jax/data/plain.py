"""Questions and passages in plain records, a JSON object or a row of a table, whatever their makers call the fields.

``names.py`` lists the names. Options are ``{"A": text, ...}``, a list of texts, a list of ``{label, text}``, lists
``text`` and ``label``, or fields of their own; letters or numbers name them. The answer is the name of an option or,
where it is none, its text. A number where options have letters is refused, unless the text stands beside it: it may
count from 0 or from 1. ``cop`` counts from 1, as in MedMCQA.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from jmlr_jax.data import fields
from jmlr_jax.data.fields import Raw
from jmlr_jax.data.names import by_known_names
from jmlr_jax.data.published import right_of_four
from jmlr_jax.data.schema import LETTERS, MAX_OPTIONS, MIN_OPTIONS, FieldError, Passage, Question

_LABELS, _TEXTS = ("label", "key", "letter", "name", "id"), ("text", "value", "content", "option")
_LETTER = re.compile(r"[(\[]?[A-Ja-j][)\].]?")
Named = dict[str, str]  # from what names an option to its text, in order


def question(record: Raw, default_id: str, ignored: Counter[str], *, joined: bool = False) -> Question:
    """A question.

    Args:
        default_id: its id where it has none.
        ignored: counts fields that are not read.
        joined: lists are one text, joined by ``|``, as in a table.

    Raises:
        FieldError: names the field that is missing, wrong, or a slip of a known one.
    """
    nested = record.get("question")
    if isinstance(nested, dict):  # {"question": {"stem": ..., "choices": [...]}, "answerKey": ...}
        record = {**{name: value for name, value in record.items() if name != "question"}, **nested}
    found, called = by_known_names(record, "question", ignored)
    try:
        return _question(found, default_id, joined)
    except FieldError as error:
        error.field = called.get(error.field, error.field)
        raise


def passage(record: Raw, ignored: Counter[str]) -> Passage:
    """A passage; `ignored` and errors as in :func:`question`."""
    found, called = by_known_names(record, "passage", ignored)
    try:
        rest = {name: fields.optional_text(found, name) for name in ("title", "source", "url")}
        return Passage(id=fields.text(found, "id"), text=fields.text(found, "text"), **rest)
    except FieldError as error:
        error.field = called.get(error.field, error.field)
        raise


def _question(found: Raw, default_id: str, joined: bool) -> Question:
    meta = fields.an_object("meta", found.get("meta") or {})
    named = _options(found)
    options = tuple(named.values())
    index = _right(found, named) if named else -1
    if not named:
        _check_free(found)
    gold = found.get("gold_doc_ids")
    if joined and isinstance(gold, str):
        found = {**found, "gold_doc_ids": [part.strip() for part in gold.split("|") if part.strip()]}
    return Question(
        id=fields.optional_text(found, "id") or default_id,
        question=fields.text(found, "question"),
        options=options,
        answer=options[index] if options else fields.text(found, "answer"),
        answer_index=index,
        gold_doc_ids=fields.texts(found, "gold_doc_ids"),
        kind=fields.optional_text(found, "kind") or str(meta.get("kind", "")),
        meta={name: item if isinstance(item, str) else json.dumps(item) for name, item in meta.items()},
    )


def _options(found: Raw) -> Named:
    """The options of a question; none of a free-text question."""
    given, columns = found.get("options"), found.get("columns")
    if columns is not None:
        if given is not None:
            raise FieldError("options", f"options in one form, there are also {', '.join(columns)}", given)
        return _in_order(columns, "option {}")
    if given is None or given == []:
        return {}
    if isinstance(given, list) and all(isinstance(item, dict) for item in given):
        given = {"label": [_part(item, _LABELS) for item in given], "text": [_part(item, _TEXTS) for item in given]}
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        labels, texts = given.get("label"), given["text"]
        if not isinstance(labels, list) or not len(set(map(str, labels))) == len(labels) == len(texts):
            raise FieldError("options", "a label of its own for each text", given)
        given = dict(zip(map(str, labels), texts, strict=True))
    if isinstance(given, list):
        texts = fields.texts(found, "options")
        if not MIN_OPTIONS <= len(texts) <= MAX_OPTIONS:
            raise FieldError("options", f"{MIN_OPTIONS} to {MAX_OPTIONS} options", len(texts))
        given = dict(zip(LETTERS, texts, strict=False))
    return _in_order(fields.an_object("options", given), "options.{}")


def _part(item: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = [item[name] for name in names if name in item]
    if len(found) != 1:
        raise FieldError("options", f"one of {', '.join(names)} in each", item)
    return found[0]


def _in_order(given: Raw, called: str) -> Named:
    """Options by their letters or numbers, which must be one run from A, 0 or 1 on."""
    count = len(given)
    runs = [list(LETTERS[:count]), list(LETTERS[:count].lower())]
    runs += [[str(begin + i) for i in range(count)] for begin in (0, 1)]
    run = next((run for run in runs if set(run) == set(given)), None)
    if run is None or not MIN_OPTIONS <= count <= MAX_OPTIONS:
        odd = next((name for name in sorted(given) if name not in LETTERS[:count]), "")
        field = "options" if "." in called else called.format(odd)
        what = f"{MIN_OPTIONS} to {MAX_OPTIONS} options under the letters A, B, ... in one run"
        raise FieldError(field, what, sorted(given))
    for name in run:
        if not isinstance(given[name], str) or not given[name].strip():
            raise FieldError(called.format(name), "non-empty text", given[name])
    return {name: given[name].strip() for name in run}


def _check_free(found: Raw) -> None:
    """Refuses a question whose answer can only mean an option, where there are none."""
    for name in ("letter", "cop", "answer"):
        value = found.get(name)
        if value is not None and (name != "answer" or _LETTER.fullmatch(str(value).strip())):
            what = "options beside it (options or choices, or A, B, ... each): a letter or number alone is no answer"
            raise FieldError(name, what, value)


def _right(found: Raw, named: Named) -> int:
    """Place of the right option; all fields that speak of it must agree."""
    options, said = list(named.values()), dict[str, int]()
    number = found.get("letter") if not _names(found.get("letter"), named) else None
    if "cop" in found:
        said["cop"] = right_of_four(found["cop"])
        if said["cop"] >= len(options):
            raise FieldError("cop", f"1 to {len(options)}", found["cop"])
    if "letter" in found and not _is_number(number):
        said["letter"] = _place("letter", found, named)
    if "answer" in found:
        text, places = str(found["answer"]).strip(), set(said.values())
        agreed = len(places) == 1 and options[min(places)] == text
        said["answer"] = min(places) if agreed else _place("answer", found, named)
    if not said:
        field = "letter" if "letter" in found else "answer"
        raise FieldError(field, f"{_letters(named)} (a number may count from 0 or from 1)", found.get(field))
    if len(set(said.values())) > 1:
        raise FieldError("answer", "one right option, but the fields differ", {name: found[name] for name in said})
    index = min(said.values())
    if _is_number(number) and int(str(number)) not in (index, index + 1):
        raise FieldError("letter", f"{index} or {index + 1}, the place of the answer", number)
    return index


def _place(field: str, found: Raw, named: Named) -> int:
    """Place of the option that a field names by letter, number or text."""
    text, names = str(found[field]).strip(), _names(found[field], named)
    equal = {place for place, option in enumerate(named.values()) if option == text and isinstance(found[field], str)}
    # Of a list the letters are ours, not the maker's: a text that looks like one may be meant as text.
    readings = names | equal if isinstance(found.get("options"), list) else names or equal
    if len(readings) != 1:
        one = ", or the letter or the text of exactly one option" if readings else ", or the text of one option"
        raise FieldError(field, _letters(named) + one, found[field])
    return readings.pop()


def _names(value: object, named: Named) -> set[int]:
    """Places of options that `value` names outright."""
    text = "" if isinstance(value, bool) else str(value).strip()
    return {names.index(text) for names in ([*named], [*LETTERS[: len(named)]]) if text in names}


def _is_number(value: object) -> bool:
    return re.fullmatch(r"\d+", str(value).strip()) is not None


def _letters(named: Named) -> str:
    return f"a letter from A to {LETTERS[len(named) - 1]}"
