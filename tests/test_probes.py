"""Further readings of evaluated questions, each against one question at a time without a cache."""

from dataclasses import replace

import numpy as np
import pytest
from evaluations import brute_nll, prompt_ids, small_setting

from jmlr_jax.data.prompts import Prompts
from jmlr_jax.data.schema import Question
from jmlr_jax.data.tokenise import tokenise_questions
from jmlr_jax.data.tokenizers import encoder, load_tokenizer
from jmlr_jax.evaluation.evaluate import evaluate_arm, is_right
from jmlr_jax.evaluation.probes import Judged, conditions, orders, passages_alone, pooled


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return small_setting(tmp_path_factory.mktemp("probes"))


def option_ids(prepared, place):
    starts = np.load(prepared.directory / "tokens" / "test.option_starts.npy")
    return [prepared.tokens("test.options").row(i).tolist() for i in range(starts[place], starts[place + 1])]


def test_conditions_read_other_passages(setting):
    cfg, prepared, reader, table = setting
    gold = np.array([[0, -1], [1, 3], [-1, -1], [3, -1], [4, -1], [5, -1], [6, -1]], np.int32)
    none = np.full((7, 2), -1, np.int32)
    result = evaluate_arm(
        "jmlr", reader, prepared, "test", table, cfg, probes=[conditions({"gold": gold, "random": none})]
    )
    questions = prepared.questions("test")
    for place, row in enumerate(result.rows):
        assert row["conditions"]["random"] is None  # nothing to read
        found = row["conditions"]["gold"]
        if place == 2:
            assert found is None
            continue
        prompt = prompt_ids(prepared, place, gold[place])
        answer = prepared.tokens("test.answers").row(place).tolist()
        assert found["nll"] == pytest.approx(brute_nll(reader, prompt, answer), rel=1e-4)
        expected = [brute_nll(reader, prompt, option) for option in option_ids(prepared, place)]
        assert found["prediction"] == (int(np.argmin(expected)) if expected else None)
        assert found["correct"] == (is_right(questions[place], found["prediction"]) if expected else None)
    some = [row["conditions"]["gold"]["correct"] for row in result.rows if row["options"] and row["id"] != "q2"]
    summary = result.summary["conditions"]
    assert set(summary) == {"gold"} and summary["gold"]["n"] == len(some) == 5
    assert summary["gold"]["mean"] == pytest.approx(np.mean(some))


@pytest.mark.parametrize("form", ["text", "letter"])
def test_orders_are_those_of_turned_questions(setting, form):
    cfg, prepared, reader, table = setting
    lettered = cfg.generator.model_copy(update={"answer_form": form})
    result = evaluate_arm(
        "jmlr", reader, prepared, "test", table, cfg.model_copy(update={"generator": lettered}), probes=[orders]
    )
    engine = encoder(load_tokenizer(prepared.tokenizer_dir("generator")), continues=True)
    for place in (0, 1, 3):
        row, question = result.rows[place], prepared.questions("test")[place]
        assert len(row["orders"]) == row["options"]
        for shift, chosen in enumerate(row["orders"]):
            turned = question.options[shift:] + question.options[:shift]
            other = replace(question, options=turned, answer_index=turned.index(question.answer))
            asked, *_ = tokenise_questions(engine, Prompts(cfg.retriever, cfg.generator), [other])
            prompt = prompt_ids(prepared, place, table[place], asked.row(0))
            nll = [brute_nll(reader, prompt, option) for option in option_ids(prepared, place)]
            # Of texts, that of the option counts; of letters, that of its place.
            best = int(np.argmin(nll))
            assert chosen == (best if form == "text" else (best + shift) % row["options"])
    assert all(row["orders"][0] == row["prediction"] for row in result.rows if row["options"])


def test_a_question_that_does_not_fit_turned_is_left_out(setting):
    cfg, prepared, reader, table = setting
    lengths = np.diff(prepared.tokens("test.questions").offsets)
    short = cfg.generator.model_copy(update={"question_length": 12})  # options alone are longer than that
    result = evaluate_arm(
        "jmlr", reader, prepared, "test", table, cfg.model_copy(update={"generator": short}), probes=[orders]
    )
    assert min(lengths) > 12
    assert all(row["orders"] == [None] * row["options"] for row in result.rows)


def test_passages_are_read_alone(setting):
    cfg, prepared, reader, table = setting
    pool = pooled([table, np.array([[2, 4, -1]] * 7, np.int32)])
    assert pool[0].tolist() == [0, 1, 2, 4, -1] and pool[2].tolist() == [2, 4, -1, -1, -1]
    scores = {"score": np.arange(35.0).reshape(7, 5), "score_before": np.full((7, 5), np.nan)}
    result = evaluate_arm("jmlr", reader, prepared, "test", table, cfg, probes=[passages_alone(Judged(pool, scores))])
    for place, row in enumerate(result.rows):
        read = [int(p) for p in pool[place] if p >= 0]
        assert [one["id"] for one in row["judged"]] == [f"p{p}" for p in read]
        answer = prepared.tokens("test.answers").row(place).tolist()
        for k, (passage, one) in enumerate(zip(read, row["judged"], strict=True)):
            expected = brute_nll(reader, prompt_ids(prepared, place, [passage]), answer)
            assert one["nll"] == pytest.approx(expected, rel=1e-4)
            assert one["read"] == (passage in table[place]) and one["score"] == 5 * place + k
            assert one["score_before"] is None


def test_either_of_equal_options_is_right():
    question = Question("q", "Which?", ("aspirin", "Aspirin.", "heparin"), "Aspirin.", 1)
    assert [is_right(question, option) for option in (0, 1, 2, None)] == [True, True, False, False]
