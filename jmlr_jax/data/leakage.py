"""Removes passages that quote an evaluation question together with its answer.

The test is a run of ``n`` equal words (lower-cased, punctuation dropped; of text without spaces between words,
characters) between ``title text`` of a passage and ``question answer`` of a question. Only dev and test questions
remove passages: text shared with a training question gives no evaluation answer away, and removing it would take gold
passages from training; it is counted and shown.

A passage that is labelled gold for some question and is removed all the same is counted on its own: question sets made
by quoting their passages lose their gold this way, and then a larger ``n``, or 0 for none, is right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jmlr_jax import unspaced
from jmlr_jax.data.schema import Passage, Question
from jmlr_jax.parallel.progress import track

FILTERED_SPLITS = ("dev", "test")
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication modulo 2^64 loses nothing


@dataclass(frozen=True)
class Overlap:
    """A passage, the first question it shares words with, and the whole run of words they share."""

    passage_id: str
    question_id: str
    split: str
    shared: str
    gold: bool


@dataclass(frozen=True)
class LeakageReport:
    """What the filter did. ``removed`` are dev and test overlaps, ``train_overlaps`` stay in the corpus."""

    ngram: int
    passages: int
    removed: tuple[Overlap, ...]
    train_overlaps: tuple[Overlap, ...]
    questions_without_gold: tuple[str, ...]

    @property
    def gold_removed(self) -> int:
        """Removed passages that are gold for a question of any split."""
        return sum(overlap.gold for overlap in self.removed)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, compatibility forms and ligatures unified."""
    text = unicodedata.normalize("NFKC", text).lower()
    return unspaced.words(text) if unspaced.is_unspaced(text) else _WORD.findall(text)


def filter_leaks(
    passages: Sequence[Passage], questions: Mapping[str, Sequence[Question]], ngram: int
) -> tuple[list[Passage], LeakageReport]:
    """Passages that quote no dev or test question, in their order, and the report.

    Args:
        passages: the corpus.
        questions: by split; gold ids must already be ids of passages.
        ngram: words in a row that make a leak; 0 turns the filter off.
    """
    if not ngram:
        return list(passages), LeakageReport(0, len(passages), (), (), ())
    gold = {doc for split in questions.values() for question in split for doc in question.gold_doc_ids}
    vocabulary: dict[str, int] = {}
    texts = (f"{passage.title} {passage.text}" for passage in passages)
    corpus = _Runs(track(texts, len(passages), "looking for leaks", "passages"), vocabulary, ngram)
    evaluation = [(split, q) for split in FILTERED_SPLITS for q in questions.get(split, ())]
    training = [("train", q) for q in questions.get("train", ())]

    removed = _overlaps(passages, corpus, evaluation, vocabulary, ngram, gold)
    train_overlaps = _overlaps(passages, corpus, training, vocabulary, ngram, gold)
    gone = {overlap.passage_id for overlap in removed}
    bereft = [
        question.id
        for split in questions.values()
        for question in split
        if question.gold_doc_ids and all(doc in gone for doc in question.gold_doc_ids)
    ]
    kept = [passage for passage in passages if passage.id not in gone]
    return kept, LeakageReport(ngram, len(passages), tuple(removed), tuple(train_overlaps), tuple(bereft))


class _Runs:
    """All texts as word numbers in one flat array, and a hash of each run of ``n`` words inside one text."""

    def __init__(self, texts: Iterable[str], vocabulary: dict[str, int], n: int) -> None:
        lists = [[vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)] for text in texts]
        lengths = np.fromiter((len(numbers) for numbers in lists), np.int64, len(lists))
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.numbers = np.fromiter((number for numbers in lists for number in numbers), np.uint64, self.offsets[-1])
        windows = max(len(self.numbers) - n + 1, 0)
        hashes = np.zeros(windows, np.uint64)
        for i in range(n):
            hashes = hashes * _BASE + self.numbers[i : i + windows]
        text_of = np.repeat(np.arange(len(lists)), lengths)
        inside = text_of[:windows] == text_of[len(self.numbers) - windows :]  # first and last word in the same text
        self.starts = np.flatnonzero(inside)
        self.hashes = hashes[self.starts]
        self.text_of = text_of[self.starts]

    def span(self, text: int) -> np.ndarray:
        """Word numbers of one text."""
        return self.numbers[self.offsets[text] : self.offsets[text + 1]]


def _overlaps(
    passages: Sequence[Passage],
    corpus: _Runs,
    questions: Sequence[tuple[str, Question]],
    vocabulary: dict[str, int],
    n: int,
    gold: set[str],
) -> list[Overlap]:
    """For each passage that shares a run with a question, the first such run."""
    asked = _Runs((f"{question.question} {question.answer}" for _, question in questions), vocabulary, n)
    known, first = np.unique(asked.hashes, return_index=True)
    if not len(known) or not len(corpus.hashes):
        return []
    place = np.minimum(np.searchsorted(known, corpus.hashes), len(known) - 1)
    hits = np.flatnonzero(known[place] == corpus.hashes)
    spelled = [""] * (len(vocabulary) + 1)
    for word, number in vocabulary.items():
        spelled[number] = word
    found: dict[int, Overlap] = {}
    for hit in hits:
        row, at = int(corpus.text_of[hit]), int(first[place[hit]])
        if row in found:
            continue
        question_row = int(asked.text_of[at])
        passage_words, question_words = corpus.span(row), asked.span(question_row)
        i = int(corpus.starts[hit] - corpus.offsets[row])
        j = int(asked.starts[at] - asked.offsets[question_row])
        if not np.array_equal(passage_words[i : i + n], question_words[j : j + n]):
            continue  # two different runs with one hash
        end = n
        while i + end < len(passage_words) and j + end < len(question_words):
            if passage_words[i + end] != question_words[j + end]:
                break
            end += 1
        split, question = questions[question_row]
        passage = passages[row]
        shared = " ".join(spelled[int(number)] for number in passage_words[i : i + end])
        found[row] = Overlap(passage.id, question.id, split, shared, passage.id in gold)
    return list(found.values())
