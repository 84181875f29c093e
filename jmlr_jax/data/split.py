"""Cuts long documents into passages at sentence ends.

A word is a run of non-space; of text without spaces between words, a character (``unspaced.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from jmlr_jax.data.schema import InputError, Passage
from jmlr_jax.unspaced import is_unspaced, units

# A sentence ends at . ! or ?, closing quotes and brackets included, where white space follows; so does a paragraph.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*")
_WIDE_END = re.compile(_SENTENCE_END.pattern + r"|(?<=[。！？｡])[\"'”’)\]」』）】》〉］]*\s*")  # no space need follow


def split_document(document: Passage, max_words: int) -> list[Passage]:
    """Passages of at most ``max_words`` words, in reading order.

    A document that fits stays as it is, id included. A longer one is filled greedily with whole sentences; a sentence
    that alone exceeds the limit is cut between words. Pieces keep title, source and url and are named ``id#0``,
    ``id#1``, ...; equal input gives equal ids. No word is lost: the pieces' words in order are the document's.
    """
    if is_unspaced(document.text):
        return _split_unspaced(document, max_words)
    if len(document.text.split()) <= max_words:
        return [document]
    pieces = _filled([sentence.split() for sentence in _sentences(document.text, _SENTENCE_END)], max_words)
    return _named(document, [" ".join(words) for words in pieces])


def _split_unspaced(document: Passage, max_words: int) -> list[Passage]:
    """The same where white space does not tell words apart."""
    sentences, before = [], ""
    for sentence in _sentences(document.text, _WIDE_END):
        sentences.append(units(sentence, begins=before[-1:].isspace()))
        before = sentence
    pieces = _filled(sentences, max_words)
    if len(pieces) == 1:
        return [document]
    return _named(document, ["".join(words).strip() for words in pieces])


def _filled(sentences: Iterable[list[str]], max_words: int) -> list[list[str]]:
    """Sentences put together to pieces of at most so many words."""
    pieces: list[list[str]] = [[]]
    for words in sentences:
        if pieces[-1] and len(pieces[-1]) + len(words) > max_words:
            pieces.append([])
        for begin in range(0, len(words), max_words):
            if begin:
                pieces.append([])
            pieces[-1].extend(words[begin : begin + max_words])
    return pieces


def _named(document: Passage, texts: list[str]) -> list[Passage]:
    return [replace(document, id=f"{document.id}#{i}", text=text) for i, text in enumerate(texts)]


def split_corpus(documents: Iterable[Passage], max_words: int) -> tuple[list[Passage], dict[str, list[str]]]:
    """Splits every document; also returns, for each one that was cut, the ids of its pieces.

    Raises:
        InputError: if a piece's id is already another document's.
    """
    passages: list[Passage] = []
    pieces_of: dict[str, list[str]] = {}
    for document in documents:
        pieces = split_document(document, max_words)
        if len(pieces) > 1:
            pieces_of[document.id] = [piece.id for piece in pieces]
        passages.extend(pieces)
    made = {piece for pieces in pieces_of.values() for piece in pieces}
    taken = [passage.id for passage in passages if passage.id in made]
    if len(taken) > len(made):
        clash = next(id_ for id_ in taken if taken.count(id_) > 1)
        raise InputError(f"corpus: the id {clash!r} of a document is also that of a piece of a longer one; rename it")
    return passages, pieces_of


def _sentences(text: str, ends: re.Pattern[str]) -> list[str]:
    begin, sentences = 0, []
    for end in ends.finditer(text):
        sentences.append(text[begin : end.end()])
        begin = end.end()
    return [*sentences, text[begin:]]
