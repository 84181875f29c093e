"""Documents cut into passages: at sentence ends, nothing lost, with and without spaces between words."""

import re

import pytest

from jmlr_jax.data.readers import read_corpus
from jmlr_jax.data.schema import Passage
from jmlr_jax.data.split import split_corpus, split_document


def test_short_documents_stay_and_long_ones_split_on_sentence_ends():
    text = 'One two three. "Four five!" Six seven eight nine. Ten.'
    document = Passage("d", "T", text, "S", "U")
    assert split_document(document, 10) == [document]
    pieces = split_document(document, 5)
    assert [p.id for p in pieces] == ["d#0", "d#1"]
    assert [p.text for p in pieces] == ['One two three. "Four five!"', "Six seven eight nine. Ten."]
    assert {(p.title, p.source, p.url) for p in pieces} == {("T", "S", "U")}


def test_a_sentence_beyond_the_limit_is_cut_between_words_and_nothing_is_lost():
    text = "Short one. " + " ".join(f"w{i}" for i in range(25)) + ". Last one."
    pieces = split_document(Passage("d", "", text), 10)
    assert all(len(p.text.split()) <= 10 for p in pieces)
    assert " ".join(p.text for p in pieces).split() == text.split()


def test_split_corpus_maps_documents_to_pieces_and_refuses_a_clash():
    long, short = Passage("d", "", "a b. c d."), Passage("e", "", "a b.")
    passages, pieces_of = split_corpus([long, short], 2)
    assert [p.id for p in passages] == ["d#0", "d#1", "e"] and pieces_of == {"d": ["d#0", "d#1"]}
    with pytest.raises(ValueError, match="'d#1'"):
        split_corpus([long, Passage("d#1", "", "x")], 2)


def test_text_without_spaces_is_split_and_nothing_is_lost():
    text = "".join(f"第{i}节高血压（重）患者应当限制钠盐。" for i in range(30)) + " COVID-19 感染。\n\n末段"
    pieces = split_document(Passage("d", "T", text), 40)
    assert len(pieces) > 10 and all(40 >= len(p.text) - p.text.count("。") - 30 for p in pieces)
    assert "".join(p.text.replace(" ", "") for p in pieces) == "".join(text.split())
    assert all(p.text.startswith("第") and p.text.endswith("。") for p in pieces[:-1])
    assert "限制钠盐。第" in pieces[0].text and " COVID-19 感染" in pieces[-1].text
    assert split_document(Passage("d", "T", "一二三 四"), 4)[0].text == "一二三 四"
    (first, second) = split_document(Passage("d", "T", "一二三四五"), 4)
    assert (first.text, second.text) == ("一二三四", "五")


def test_english_passages_are_those_of_a_plain_split(shared_data):
    """Words are runs of non-space and sentences end before white space, whatever else the text holds."""
    documents, _ = read_corpus(str(shared_data / "tiny/medquad/corpus.jsonl"))
    end = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n\s*\n\s*")
    for document in documents[:300]:
        want, sentences, begin = [[]], [], 0
        for match in end.finditer(document.text):
            sentences.append(document.text[begin : match.end()].split())
            begin = match.end()
        for sentence in [*sentences, document.text[begin:].split()]:
            if want[-1] and len(want[-1]) + len(sentence) > 40:
                want.append([])
            for first in range(0, len(sentence), 40):
                want += [[]] * bool(first)
                want[-1] = want[-1] + sentence[first : first + 40]
        pieces = split_document(document, 40)
        assert [p.text for p in pieces] == ([document.text] if len(want) == 1 else [" ".join(w) for w in want])
