"""The names under which the fields of plain records are known, and what becomes of a field of another name.

Names are compared without case and punctuation: ``gold_doc_ids`` is ``Gold Doc IDs``. A field of another name is left
out and counted, unless it looks like one that the record lacks: then it is refused by name.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from jmlr_jax.data.schema import FieldError

Kind = Literal["question", "passage"]

KNOWN: dict[Kind, dict[str, str]] = {  # our name: the names it is known by
    "question": {
        "id": "id qid question_id example_id",
        "question": "question query stem question_text question_stem",
        "options": "options option choices choice answer_options answer_choices alternatives",
        "answer": "answer correct_answer right_answer gold_answer correct",
        "letter": "answer_idx answer_index answer_id answer_letter answer_key correct_option correct_index correct_idx "
        "correct_letter correct_choice correct_answer_idx",
        "cop": "cop",
        "gold_doc_ids": "gold_doc_ids gold_ids gold_passage_ids",
        "kind": "kind",
        "meta": "meta",
    },
    "passage": {
        "id": "id pid docid docno document_id passage_id",
        "title": "title heading",
        "text": "text contents content passage passage_text body",
        "source": "source",
        "url": "url link",
    },
}
_SIMILAR = 0.8  # of two names, from 0 to 1, above which one is taken for a slip of the other
_OPTION = re.compile(r"(?:option|opt|op|choice|answer|ans)?([a-j])|(?:option|opt|op|choice|answer|ans)([0-9]+|[k-r])")
_WRONG_OPTION = re.compile(r"(?:distractor|incorrect|wrong)[a-z]*[0-9]*")


def by_known_names(
    record: Mapping[str, Any], kind: Kind, ignored: Counter[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The record under our own names, the keys of ``KNOWN[kind]``, and what it calls them itself.

    A field of null or blank text counts as missing.

    Of questions, options in fields of their own (``A``, ``opa``, ``Choice B``, ``option_1``) become one field more,
    ``columns``: from what names each (``A``, ``a``, ``B``, ``1``) to its text.

    Args:
        ignored: counts the fields that are left out.

    Raises:
        FieldError: a thing that two fields give two values for, or a name that is a slip of one that is missing.
    """
    found: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    called: dict[str, str] = {}
    other: list[str] = []
    for name, value in record.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        place, option = _place(name, kind)
        if place is None and not option:
            other.append(name)
        else:
            held, key = (columns, option) if option else (found, str(place))
            if held.get(key, value) != value:
                raise FieldError(name, f"what another field says of the same ({key})", value)
            held[key] = value
            called[key] = name
    if columns:
        found["columns"] = columns
    for name in other:
        near = _nearest(name, kind)
        if near and near not in found and not (near == "options" and columns):
            raise FieldError(name, f"a known field; the nearest is {near!r}: rename it, or take it out", record[name])
        ignored[name] += 1
    return found, called


@lru_cache(maxsize=4096)
def _place(name: str, kind: Kind) -> tuple[str | None, str]:
    """Our name of a field, or else what names the option that it is."""
    squeezed = _squeezed(name)
    if place := _aliases(kind).get(squeezed):
        return place, ""
    option = _OPTION.fullmatch(squeezed) if kind == "question" else None
    if option is None:
        return None, ""
    return None, option[2] or next(letter for letter in reversed(name) if letter.isalnum())


@lru_cache(maxsize=4096)
def _nearest(name: str, kind: Kind) -> str | None:
    if kind == "question" and _WRONG_OPTION.fullmatch(_squeezed(name)):
        return "options"
    close = difflib.get_close_matches(_squeezed(name), _aliases(kind), n=1, cutoff=_SIMILAR)
    return _aliases(kind)[close[0]] if close else None


@lru_cache
def _aliases(kind: Kind) -> dict[str, str]:
    return {_squeezed(name): ours for ours, names in KNOWN[kind].items() for name in names.split()}


def _squeezed(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
