"""Words of text that is not written with spaces between them: each Chinese or Japanese character counts as one.

That is where Unicode (UAX 29) breaks such text without a dictionary. Other text is left as it is, to the letter.
"""

from __future__ import annotations

import re

_CHARACTERS = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U00020000-\U000323af"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"  # Hiragana, Katakana
)
_ONE = re.compile(f"[{_CHARACTERS}]")
_RUN = re.compile(f"[{_CHARACTERS}]+")
_OPEN = "(\\[{“‘（［｛〔「『【《〈"
# A character with the punctuation around it, or a run of others; never white space.
_UNIT = re.compile(rf"[{_OPEN}]*[{_CHARACTERS}][^\w\s{_OPEN}]*|[^\s{_CHARACTERS}]+")
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")


def is_unspaced(text: str) -> bool:
    """Whether there is any character of a script that puts no spaces between words."""
    return not text.isascii() and _ONE.search(text) is not None


def units(text: str, *, begins: bool) -> list[str]:
    """Words with their punctuation and, where there is any, one space before them.

    Args:
        begins: a space before the first word, too, which stands behind other text.

    >>> units("COVID-19感染（重）。 患者", begins=False)
    ['COVID-19', '感', '染', '（重）。', ' 患', '者']
    """
    found: list[str] = []
    for run in text.split():
        first, *rest = _UNIT.findall(run)
        found += [f" {first}" if found or begins else first, *rest]
    return found


def words(text: str) -> list[str]:
    r"""Words without punctuation; of text with spaces the matches of ``\w+``.

    >>> words("the 2型 patient")
    ['the', '2', '型', 'patient']
    """
    return _WORD.findall(text)


def spaced(text: str) -> str:
    """The text with each run of such characters as its overlapping pairs, by which it can be found like words.

    >>> spaced("用胰岛素 twice")
    ' 用胰 胰岛 岛素  twice'
    """
    return _RUN.sub(_pairs, text) if is_unspaced(text) else text


def _pairs(run: re.Match[str]) -> str:
    text = run[0]
    return f" {' '.join(text[i : i + 2] for i in range(max(len(text) - 1, 1)))} "
