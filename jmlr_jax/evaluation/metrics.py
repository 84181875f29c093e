"""Numbers that evaluations report, in plain numpy: ranking quality, answer parsing, text overlap, intervals.

Every function here returns one value per question where that makes sense, so that the same values feed a mean,
a bootstrap interval and a paired comparison.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]

# --- ranking ---------------------------------------------------------------------------------------------------


def hits(table_NxK: ArrayLike, gold_NxG: ArrayLike) -> NDArray[np.bool_]:
    """Whether the passage at each rank is a gold one, ``[N, K]``.

    Args:
      table_NxK: passage rows, best first; -1 where there is none.
      gold_NxG: gold passage rows in any order; -1 where there is none.
    """
    table, gold = np.asarray(table_NxK), np.asarray(gold_NxG)
    if table.ndim != 2 or gold.ndim != 2 or len(table) != len(gold):
        raise ValueError(f"expected table [N, K] and gold [N, G], got {table.shape} and {gold.shape}")
    found = np.zeros(table.shape, bool)
    for g in range(gold.shape[1]):  # a loop over G keeps memory at N x K
        found |= (table == gold[:, g : g + 1]) & (table >= 0)
    return found


def hit_at(table_NxK: ArrayLike, gold_NxG: ArrayLike, k: int) -> Values:
    """1 where any gold passage stands among the first k, else 0; NaN for a question without gold passages.

    One gold passage is enough to answer from, so open-domain QA calls this top-k accuracy or recall; with a single
    gold passage it equals hit@k.

    >>> hit_at([[4, 2, -1], [5, 6, 7], [1, 2, 3]], [[2, -1], [-1, -1], [9, 8]], 2)
    array([ 1., nan,  0.])
    """
    return _with_gold(hits(table_NxK, gold_NxG)[:, :k].any(1).astype(np.float64), gold_NxG)


def mrr_at(table_NxK: ArrayLike, gold_NxG: ArrayLike, k: int = 10) -> Values:
    """Reciprocal rank of the first gold passage among the first k, 0 when there is none; NaN without gold.

    >>> mrr_at([[4, 2], [5, 6]], [[2], [9]])
    array([0.5, 0. ])
    """
    found = hits(table_NxK, gold_NxG)[:, :k]
    rank = found.argmax(1) + 1 if found.shape[1] else np.ones(len(found))
    return _with_gold(np.where(found.any(1), 1 / rank, 0.0), gold_NxG)


def ndcg_at(table_NxK: ArrayLike, gold_NxG: ArrayLike, k: int = 10) -> Values:
    """Normalised discounted cumulative gain over the first k with gains 0 and 1; NaN for a question without gold.

    >>> ndcg_at([[4, 2, 7]], [[2, 4]]).round(4)  # both on top, in either order
    array([1.])
    >>> ndcg_at([[4, 2, 7]], [[2, 9]]).round(4)  # (1 / log2 3) / (1 + 1 / log2 3)
    array([0.3869])
    """
    found = hits(table_NxK, gold_NxG)[:, :k].astype(np.float64)
    discount = 1 / np.log2(np.arange(2, k + 2))
    gold_count = np.minimum(_gold_count(gold_NxG), k)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[gold_count]
    return _with_gold(found @ discount[: found.shape[1]] / np.where(ideal > 0, ideal, 1.0), gold_NxG)


def ranking_summary(table_NxK: ArrayLike, gold_NxG: ArrayLike, hit_ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Means over the questions that have gold passages: ``hit@k`` for each k, ``mrr@10``, ``ndcg@10`` and ``n``.

    ``n`` is the number of questions averaged; with n = 0 the means are left out.
    """
    n = int((_gold_count(gold_NxG) > 0).sum())
    if n == 0:
        return {"n": 0}
    summary = {f"hit@{k}": float(np.nanmean(hit_at(table_NxK, gold_NxG, k))) for k in hit_ks}
    summary["mrr@10"] = float(np.nanmean(mrr_at(table_NxK, gold_NxG)))
    summary["ndcg@10"] = float(np.nanmean(ndcg_at(table_NxK, gold_NxG)))
    return {**summary, "n": n}


def _gold_count(gold_NxG: ArrayLike) -> NDArray[np.int64]:
    # Distinct rows only: a gold passage listed twice can be found once.
    return np.array([len(set(row[row >= 0].tolist())) for row in np.asarray(gold_NxG)], np.int64)


def _with_gold(values: ArrayLike, gold_NxG: ArrayLike) -> Values:
    return np.where(_gold_count(gold_NxG) > 0, values, np.nan).astype(np.float64)


# --- intervals -------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of a - b with its bootstrap interval and the two-sided p of 'no difference'."""

    mean: float
    low: float
    high: float
    p: float


def bootstrap_interval(
    values_n: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of the mean.

    Args:
      values_n: one value per question.
      groups: n hashable labels. Questions about the same thing (one condition) are not independent: with labels,
        whole groups are drawn (cluster bootstrap), which widens the interval accordingly.
      seed: of the resampling; the same seed gives the same interval.
      resamples: number of bootstrap samples.
      level: coverage.

    Raises:
      ValueError: no values, a NaN among them, or as many labels as there are values missing.

    When all values are equal every resample is the same and the interval has width 0: it then says nothing about
    the chance of a rare other outcome.
    """
    values = _checked(values_n)
    means = _resampled_means(values, groups, seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(
    a_n: ArrayLike,
    b_n: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Difference:
    """Difference of two systems on the same questions, resampling questions (or groups of them) in pairs.

    Arguments as in :func:`bootstrap_interval`. p is twice the smaller share of resampled differences on either side
    of zero, with one added above and below so that it is never exactly 0; 1 when the two never differ.

    Raises:
      ValueError: the two do not have the same number of values.
    """
    a, b = _checked(a_n), _checked(b_n)
    if len(a) != len(b):
        raise ValueError(f"paired comparison of {len(a)} with {len(b)} values")
    means = _resampled_means(a - b, groups, seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(tail)) / (1 + resamples))
    return Difference(float((a - b).mean()), float(low), float(high), p)


def _checked(values_n: ArrayLike) -> Values:
    values = np.asarray(values_n, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a non-empty vector of values, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError("values hold NaN: leave out the questions that have no value before bootstrapping")
    return values


def _resampled_means(values: Values, groups: Sequence[object] | None, seed: int, resamples: int) -> Values:
    if groups is None:
        index = np.arange(len(values))
    elif len(groups) != len(values):
        raise ValueError(f"{len(groups)} group labels for {len(values)} values")
    else:
        numbers: dict[object, int] = {}
        index = np.array([numbers.setdefault(g, len(numbers)) for g in groups])
    count = index.max() + 1
    sums, sizes = np.bincount(index, values, count), np.bincount(index, minlength=count).astype(np.float64)
    rng = np.random.default_rng(seed)
    block = max(1, 2_000_000 // count)  # bounds memory at about 16 MB whatever the number of questions
    means = []
    for start in range(0, resamples, block):
        drawn = rng.multinomial(count, np.full(count, 1 / count), min(block, resamples - start))
        means.append(drawn @ sums / (drawn @ sizes))
    return np.concatenate(means)


# --- answers in text -------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJ"
_QUOTES = r"[\"'*_\[(<\s]*"
_END = r"(?=[\"'*_\])>]*\s*(?:$|[.,;:!\])\n]|(?:because|since|as)\b))"


def parse_answer(text: str, options: Sequence[str]) -> int | None:
    """Which option a generated text chooses; None when it chooses none, or more than one.

    Read are an option's own text in any case, alone or inside a sentence (the longest where options contain one
    another), and its letter: alone (``B``, ``b)``, ``(B)``, ``B.``), in front (``B) aspirin``), in parentheses, or
    after a phrase such as ``answer:``, ``the answer is`` or ``option``. A capital that merely starts a sentence
    ("A patient ...") is not a letter. Any text is accepted, the empty one included (method.md, fault 13).

    >>> options = ("aspirin", "low-dose aspirin", "heparin", "none of these")
    >>> [parse_answer(t, options) for t in ("b", "Answer: C.", "Low-dose Aspirin", "It must be heparin.", "", "A or B")]
    [1, 2, 1, 2, None, None]
    """
    text, options = _fold(text), [_fold(option) for option in options]
    if not text or not options:
        return None
    whole = [i for i, option in enumerate(options) if option.casefold() == text.casefold()]
    if not whole:
        whole = [i for i, option in enumerate(options) if _words(option) and _words(option) == _words(text)]
    if len(whole) == 1:
        # "C" may be the option "C" (a vitamin) or the third option: one choice only if both are the same.
        return whole[0] if _letters(text, len(options)) <= {whole[0]} else None
    rest, chosen = _take_options(text, options)
    chosen |= _letters(rest, len(options))
    return chosen.pop() if len(chosen) == 1 else None


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
