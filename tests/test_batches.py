"""The question stream and the batches that a step reads."""

import json

import numpy as np
import pytest

from jmlr_jax.config import Config, DataConfig, MixConfig, TrainConfig
from jmlr_jax.config_models import BertConfig, GeneratorConfig, RetrieverConfig
from jmlr_jax.data.batches import Prepared, assemble, question_stream
from jmlr_jax.data.prepare import prepare
from jmlr_jax.data.tokenizers import load_tokenizer

NAMES = "alpha beta gamma delta epsilon zeta eta".split()
PASSAGES = [
    {"id": f"p{i}", "title": f"Condition {name}", "text": f"It is treated with drug{i}, always."}
    for i, name in enumerate(NAMES)
]
QUESTIONS = [
    {
        "id": f"q{i}",
        "question": f"What treats condition {NAMES[i]}?",
        "options": [f"drug{i}", f"drug{(i + 1) % 7}", "rest"][: 2 + i % 2],
        "answer": f"drug{i}",
        "gold_doc_ids": [f"p{i}"],
    }
    for i in range(6)
]


def small_config(folder, **data) -> Config:
    """Writes the set above and returns a configuration that reads it."""
    for name, records in (("corpus", PASSAGES), ("train", QUESTIONS[:4]), ("test", QUESTIONS[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = {f"{name}_path": str(folder / f"{name}.jsonl") for name in ("corpus", "train", "test")}
    return Config(
        data=DataConfig(questions="jsonl", **paths | data),
        retriever=RetrieverConfig(query_length=16, passage_length=24, bert=BertConfig(max_positions=24)),
        generator=GeneratorConfig(passage_length=20, question_length=40, answer_length=6),
        train=TrainConfig(candidates=3, mix=MixConfig(index=3, bm25=0, random=0), sampled=2, read_passages=1),
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("small")
    prepare(small_config(folder), folder / "data")
    return Prepared.open(folder / "data")


def text(prepared, which, ids, length):
    return load_tokenizer(prepared.tokenizer_dir(which)).decode(ids[:length])


# ---------------------------------------------------------------- stream


def test_every_epoch_visits_each_question_once_in_a_new_order():
    stream = question_stream(10, 4, seed=3)
    rows = np.concatenate([next(stream) for _ in range(10)]).reshape(4, 10)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4
    again = question_stream(10, 4, seed=3)
    np.testing.assert_array_equal(next(again), rows[0, :4])
    other = question_stream(10, 4, seed=4)
    assert next(other).tolist() != rows[0, :4].tolist()


def test_resume_is_exact():
    stream = question_stream(7, 3, 5)
    for _ in range(6):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream).tolist() for _ in range(8)]
    resumed = question_stream(7, 3, 5)
    resumed.set_state(state)
    assert [next(resumed).tolist() for _ in range(8)] == expected


def test_stream_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="no questions"):
        question_stream(0, 4, 0)


# ---------------------------------------------------------------- batches

SHAPES = {
    "query_ids_BxQ": (2, 16),
    "query_len_B": (2,),
    "passage_ids_BxKxP": (2, 3, 24),
    "passage_len_BxK": (2, 3),
    "reader_ids_BxKxL": (2, 3, 20),
    "reader_len_BxK": (2, 3),
    "question_ids_BxS": (2, 40),
    "question_len_B": (2,),
    "answer_ids_BxA": (2, 6),
    "answer_len_B": (2,),
    "valid_BxK": (2, 3),
}


def test_batch_holds_exactly_what_a_step_reads(prepared):
    table_BxK = np.array([[6, 0, -1], [2, -1, -1]], np.int32)
    batch = assemble(prepared, "train", np.array([3, 1]), table_BxK)
    assert {name: array.shape for name, array in batch.items()} == SHAPES
    assert {array.dtype for name, array in batch.items() if name != "valid_BxK"} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(batch["valid_BxK"], [[True, True, False], [True, False, False]])
    for name in ("passage_len_BxK", "reader_len_BxK"):
        np.testing.assert_array_equal(batch[name] > 0, batch["valid_BxK"])

    def generated(name, length, *place):
        return text(prepared, "generator", batch[name][place], batch[length][place])

    assert (
        generated("reader_ids_BxKxL", "reader_len_BxK", 0, 0)
        == "\nReference:\nCondition eta. It is treated with drug6, always."
    )
    assert generated("question_ids_BxS", "question_len_B", 0) == (
        "\nMy Question:\nWhat treats condition delta?\nA) drug3 B) drug4 C) rest\nAnswer:"
    )
    assert generated("answer_ids_BxA", "answer_len_B", 1) == " drug1</s>"
    query = text(prepared, "retriever", batch["query_ids_BxQ"][1], batch["query_len_B"][1])
    assert query == "[CLS] [Q] what treats condition beta? [SEP]"
    passage = text(prepared, "retriever", batch["passage_ids_BxKxP"][1, 0], batch["passage_len_BxK"][1, 0])
    assert passage == "[CLS] [D] condition gamma. it is treated with drug2, always. [SEP]"


def test_queries_are_filled_with_masks_and_passages_with_padding(prepared):
    ids = prepared.retriever_ids
    batch = assemble(prepared, "test", np.array([0]), np.array([[1, -1, -1]]))
    assert set(batch["query_ids_BxQ"][0, batch["query_len_B"][0] :].tolist()) == {ids.mask}
    assert set(batch["passage_ids_BxKxP"][0, 0, batch["passage_len_BxK"][0, 0] :].tolist()) == {ids.pad}
    assert set(batch["passage_ids_BxKxP"][0, 1].tolist()) == {ids.pad}


def test_options_and_gold(prepared):
    ids, lengths = prepared.option_tokens("train", np.array([0, 1]))
    assert ids.shape == (2, 3, 6) and (lengths > 0).tolist() == [[True, True, False], [True, True, True]]
    assert text(prepared, "generator", ids[1, 2], lengths[1, 2]) == " rest</s>"
    assert prepared.gold("test", 1).tolist() == [5]
    assert prepared.skip_V.shape == (prepared.retriever_ids.vocab_size,) and prepared.skip_V.any()


def test_batch_refuses_rows_that_are_not_there(prepared):
    with pytest.raises(ValueError, match="candidate table"):
        assemble(prepared, "train", np.array([0, 1]), np.zeros((3, 2), np.int32))
    with pytest.raises(IndexError):
        assemble(prepared, "train", np.array([-1]), np.zeros((1, 2), np.int32))
    with pytest.raises(IndexError):
        assemble(prepared, "train", np.array([0]), np.full((1, 2), 7, np.int32))
    with pytest.raises(ValueError, match="no split 'validation'"):
        prepared.questions("validation")


def test_nothing_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match="jmlr prepare"):
        Prepared.open(tmp_path)
