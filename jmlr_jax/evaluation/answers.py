"""Reads an answer out of generated text: which option it chooses, or how much of a free answer it has.

Generators answer in many forms: an option's letter or text, a sentence, a line of JSON, ``\\boxed{B}``, Markdown, or
all of these after a train of thought. Nothing that cannot be read counts as any option.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_LETTERS = "ABCDEFGHIJ"
_QUOTES = r"[\"'*_\[(<\s]*"
_END = r"(?=[\"'*_\])>]*\s*(?:$|[.,;:!\])\n]|(?:because|since|as)\b))"
_THOUGHT = r"think|thinking|thought|reasoning"
_KEYS = r"(?:final|correct|predicted)?[ _-]?(?:answer|option|choice)(?:[ _-]?(?:choice|letter|option))?|prediction"
_STRING = r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'|([^\s"\',}\]\[{]+)'
_JSON = re.compile(
    rf"[\"'](?:{_KEYS})[\"']\s*:\s*(?:\[\s*(?:{_STRING})\s*\]|(?:{_STRING})\s*(?=[}},\n]|$))", re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm)\s*\{([^{}]*)\}")


def parse_answer(text: str, options: Sequence[str]) -> int | None:
    """Which option a generated text chooses; None when it chooses none, or more than one.

    Read are an option's own text in any case, alone or inside a sentence (the longest where options contain one
    another), and its letter: alone (``B``, ``b)``, ``(B)``, ``B.``), in front (``B) aspirin``), in parentheses, in
    bold, or after a phrase such as ``answer:``, ``the answer is`` or ``option``. A capital that merely starts a
    sentence ("A patient ...") is not a letter. What stands in ``\\boxed{}``, or in JSON under ``answer``,
    ``answer_choice`` and the like, is the answer whatever else is said; what was thought aloud before ``</think>`` is
    not read. Of options that say the same the first is given. Any text is accepted, the empty one included (method.md,
    fault 13).

    >>> options = ("aspirin", "low-dose aspirin", "heparin", "none of these")
    >>> [parse_answer(t, options) for t in ("b", "Answer: C.", "Low-dose Aspirin", "It must be heparin.", "", "A or B")]
    [1, 2, 1, 2, None, None]
    >>> [parse_answer(t, options) for t in ('{"why": "not A", "answer": "C"}', "<think>A?</think> **C**")]
    [2, 2]
    """
    text = _after_thought(text)
    for given in (_boxed(text), _in_json(text)):
        if given:
            found = {choice for each in given if (choice := _chosen(each, options)) is not None}
            return found.pop() if len(found) == 1 else None
    return _chosen(text, options)


def first_equal(options: Sequence[str]) -> list[int]:
    """For each option the place of the first that says the same: case, spaces and a full stop at the end aside.

    >>> first_equal(["Aspirin", "heparin", "aspirin."])
    [0, 1, 0]
    """
    said = [_fold(option).casefold() for option in options]
    return [said.index(each) for each in said]


def _after_thought(text: str) -> str:
    """What follows the train of thought; nothing where it does not end."""
    text = re.split(rf"</(?:{_THOUGHT})>", text, flags=re.IGNORECASE)[-1]
    return re.split(rf"<(?:{_THOUGHT})>", text, flags=re.IGNORECASE)[0]


def _boxed(text: str) -> list[str]:
    return [_TEXT.sub(r"\1", inner).strip() for inner in _BOXED.findall(text)]


def _in_json(text: str) -> list[str]:
    """Values of the answer's key; by pattern, since what a generator writes is often cut off or not quite JSON."""
    return ["".join(groups).replace("\\n", " ").replace("\\", "") for groups in _JSON.findall(text)]


def _chosen(text: str, options: Sequence[str]) -> int | None:
    """The option that plain text chooses."""
    first = first_equal(options)
    text, options = _fold(text), [_fold(option) for option in options]
    if not text or not options:
        return None
    whole = {first[i] for i, option in enumerate(options) if option.casefold() == text.casefold()}
    if not whole:
        whole = {first[i] for i, option in enumerate(options) if _words(option) and _words(option) == _words(text)}
    named = {first[i] for i in _letters(text, len(options))}
    if len(whole) == 1:
        # "C" may be the option "C" (a vitamin) or the third option: one choice only if both are the same.
        return whole.pop() if named <= whole else None
    rest, found = _take_options(text, options)
    found = {first[i] for i in (*found, *_letters(rest, len(options)))}
    return found.pop() if len(found) == 1 else None


def _fold(text: str) -> str:
    """Compatible Unicode form, single spaces, without quotes and full stops around it."""
    text = re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", text))
    return text.strip().strip("\"'").rstrip(".").strip()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _take_options(text: str, options: Sequence[str]) -> tuple[str, set[int]]:
    """(text with the options' texts blanked out, which were found), longer options first."""
    found: set[int] = set()
    for i in sorted(range(len(options)), key=lambda i: -len(options[i])):
        if not options[i]:
            continue
        # A single letter as an option's text would be found in any sentence; alone it was matched as a whole before.
        if len(options[i]) == 1 and options[i].isalpha():
            continue
        pattern = r"\s+".join(re.escape(word) for word in options[i].split())
        # Not inside a longer word, a hyphenated one, or a decimal number.
        text, count = re.subn(rf"(?<![\w-])(?<!\d[.,]){pattern}(?![\w-]|[.,]\d)", "\x00", text, flags=re.IGNORECASE)
        if count:
            found.add(i)
    return text, found


def _letters(text: str, count: int) -> set[int]:
    """Options named by letter."""
    upper = f"[A-{_LETTERS[min(count, len(_LETTERS)) - 1]}]"
    either = upper[:-1] + upper[1:-1].lower() + "]"
    named = r"(?:answer|option|choice)\s*(?:(?:is|are|would be|must be|should be)\b)?\s*:?"
    patterns = (
        rf"^{_QUOTES}({either})[\"'*_\])>.:, ]*(?:$|\n)",  # alone on the first line
        rf"^[\s(\[*]*({either})[)\]:]",  # in front: "b) ...", "(B) ..."
        rf"^[\s*]*({upper})\.(?=\s)",  # in front: "B. ..."
        rf"\(({upper})\)",  # anywhere: "(B)"
        rf"\*\*\(?({upper})[).:]*\*\*",  # anywhere in bold: "**B**", "**B.**"
        rf"(?i:\b{named}){_QUOTES}({either}){_END}",
        rf"(?i:\b{named}){_QUOTES}({upper.replace('A-', 'B-')})(?=\s)",  # "answer is B ..."; "A ..." may be the article
    )
    found = [m for pattern in patterns for m in re.findall(pattern, text)]
    for pair in re.findall(rf"\b({upper})\)?\s*(?:,|/|&|\b(?:or|and)\b)\s*\(?({upper})\b", text):  # "B or C"
        found += pair
    return {_LETTERS.index(letter.upper()) for letter in found}


def exact_match(text: str, answer: str) -> bool:
    """Equal after lower-casing and dropping punctuation and the articles a, an, the.

    >>> exact_match("The Aspirin.", "aspirin"), exact_match("", "aspirin")
    (True, False)
    """
    return _content(text) == _content(answer)


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of word precision and recall, words as in :func:`exact_match`; 0 when nothing is shared.

    >>> round(token_f1("low-dose aspirin daily", "aspirin"), 4)  # precision 1/4, recall 1
    0.4
    """
    a, b = Counter(_content(text)), Counter(_content(answer))
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values())) if shared else 0.0


def _content(text: str) -> list[str]:
    return [word for word in _words(unicodedata.normalize("NFKC", text)) if word not in ("a", "an", "the")]
