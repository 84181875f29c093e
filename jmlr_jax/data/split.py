"""Cuts long documents into passages at sentence ends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from jmlr_jax.data.schema import InputError, Passage

# A sentence ends at . ! or ?, closing quotes and brackets included, where white space follows; so does a paragraph.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*")


def split_document(document: Passage, max_words: int) -> list[Passage]:
    """Passages of at most ``max_words`` words (runs of non-space), in reading order.

    A document that fits stays as it is, id included. A longer one is filled greedily with whole sentences; a sentence
    that alone exceeds the limit is cut between words. Pieces keep title, source and url and are named ``id#0``,
    ``id#1``, ...; equal input gives equal ids. No word is lost: the pieces' words in order are the document's.
    """
    if len(document.text.split()) <= max_words:
        return [document]
    pieces: list[list[str]] = [[]]
    for sentence in _sentences(document.text):
        words = sentence.split()
        if pieces[-1] and len(pieces[-1]) + len(words) > max_words:
            pieces.append([])
        for begin in range(0, len(words), max_words):
            if begin:
                pieces.append([])
            pieces[-1].extend(words[begin : begin + max_words])
    return [replace(document, id=f"{document.id}#{i}", text=" ".join(words)) for i, words in enumerate(pieces)]


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


def _sentences(text: str) -> list[str]:
    begin, sentences = 0, []
    for end in _SENTENCE_END.finditer(text):
        sentences.append(text[begin : end.end()])
        begin = end.end()
    return [*sentences, text[begin:]]
