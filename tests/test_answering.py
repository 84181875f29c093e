"""The engine behind `jmlr ask` and `jmlr serve`: its numbers are the evaluation's, and its effects what they say."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from answering import ARMS, SETTINGS, rows_of
from runs import open_run

from jmlr_jax import cli
from jmlr_jax.answering.asked import MAX_QUESTION, Asked, AskError
from jmlr_jax.answering.engine import Engine, Gone
from jmlr_jax.answering.home import BEFORE, RunHome
from jmlr_jax.answering.program import ROWS
from jmlr_jax.answering.retrieval import SearchError
from jmlr_jax.answering.trust import Trust, fitted, option_probabilities
from jmlr_jax.data.batches import Prepared
from jmlr_jax.evaluation.calibration import fit_temperature, options_of, probabilities
from jmlr_jax.evaluation.reading import Setting, evaluate_batch, option_losses, question_batch

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def run(askable, patch):
    return open_run(askable / "data", askable, **SETTINGS)


@pytest.fixture(scope="module")
def engine(run):
    found = Engine(RunHome(run))
    found.open()
    return found


def asked(row, arm="jmlr", **more):
    return Asked(row["question"], tuple(row["option_texts"]), arm, **more)


@pytest.mark.parametrize("arm", ARMS)
def test_numbers_are_those_of_the_evaluation(run, engine, arm):
    rows = rows_of(run.directory, arm)
    answers = engine.answer_all([asked(row, arm) for row in rows])
    assert len(rows) == 8
    for row, one in zip(rows, answers, strict=True):
        assert [source.id for source in one.passages] == row["passages"]
        assert [choice.nll for choice in one.said.choices] == pytest.approx(row["option_nll"], abs=1e-4)
        assert one.said.letter == "ABCD"[row["prediction"]] and one.written == row["generated"]
        assert one.closed_book.choices[row["answer"]].nll == pytest.approx(row["nll_none"], abs=1e-4)
        assert sum(not source.read for source in one.passages) == row["dropped"]
        if row["prediction"] == row["answer"]:
            assert one.nll_none == pytest.approx(row["nll_none"], abs=1e-4)


def test_effects_are_differences_of_what_is_read(run, engine):
    """Each against the evaluation's own program, asked for the same passages."""
    place, table, row = _first(run, "jmlr")
    one = engine.answer(asked(row))
    setting = Setting(engine.arm("jmlr").reader, run.prepared, "test", run.cfg)
    option = 1 + "ABCD".index(one.said.letter)

    def nll(*kept):
        some = np.array([[table[k] for k in kept] + [-1] * (3 - len(kept))], np.int32)
        return option_losses(setting, "reading", np.array([place]), some)[0, option]

    assert one.nll_none == pytest.approx(nll(), abs=1e-4)
    for k, source in enumerate(one.passages):
        others = [other for other in range(3) if other != k]
        assert source.without == pytest.approx(nll(*others) - nll(0, 1, 2), abs=1e-4)
        assert source.alone == pytest.approx(nll() - nll(k), abs=1e-4)
    assert one.effect == pytest.approx(nll() - nll(0, 1, 2), abs=1e-4)
    assert len({round(source.without, 5) for source in one.passages}) == 3


def _first(run, arm):
    row = rows_of(run.directory, arm)[0]
    ids = [passage.id for passage in run.prepared.passages]
    place = next(i for i, q in enumerate(run.prepared.questions("test")) if q.id == row["id"])
    return place, [ids.index(name) for name in row["passages"]], row


@pytest.mark.exhaustive
def test_a_chat_template_stands_around_the_prompt_as_in_evaluation(run):
    """Its opening, the turn after the question, and what ends an answer beside the end token."""
    place, table, row = _first(run, "jmlr")
    head, tail = [5, 9, 4, 9, 5], [6, 7]
    ids = replace(run.prepared.generator_ids, head=tuple(head), tail=tuple(tail))

    def ask(stops):
        card = run.prepared.card
        card = {**card, "generator_ids": {**card["generator_ids"], "head": head, "tail": tail, "stops": stops}}
        chatting = replace(run, prepared=Prepared(run.prepared.directory, card))
        return Engine(RunHome(chatting), ("jmlr",)).answer(asked(row))

    one, reader = ask([]), RunHome(run).arm("jmlr").reader
    batch = question_batch(
        Setting(reader, run.prepared, "test", run.cfg), np.array([place]), np.array([table], np.int32)
    )
    length = batch["question_len_B"][0]
    batch["question_ids_BxS"][0, length : length + len(tail)] = tail
    batch["question_len_B"] = batch["question_len_B"] + len(tail)
    shape = {"cfg": reader.cfg, "ids": ids, "max_length": run.cfg.generator.max_length, "replicated": None}
    found = evaluate_batch(reader.params, reader.adapters, batch, **shape)
    assert [choice.nll for choice in one.said.choices] == pytest.approx(found["nll"][0, 1:].tolist(), abs=1e-4)
    made = found["tokens"][0, : int(found["made"][0])].tolist()
    assert one.written == reader.decode([token for token in made if token not in ids.ends]).strip() != ""
    assert one.written != row["generated"] and made[0] not in ids.ends
    assert ask([made[0]]).written == ""


def test_together_as_alone(run, engine):
    rows = (rows_of(run.directory, "jmlr") * 2)[:11]
    several = engine.answer_all([asked(row, k=1 + i % 3) for i, row in enumerate(rows)])
    for i, (row, one) in enumerate(zip(rows, several, strict=True)):
        alone = engine.answer(asked(row, k=1 + i % 3))
        assert len(one.passages) == 1 + i % 3 and one.said.letter == alone.said.letter
        got, want = ([s.without for s in each.passages] + [each.said.nll] for each in (one, alone))
        assert got == pytest.approx(want, abs=1e-4)


def test_in_words(run, engine):
    row = rows_of(run.directory, "jmlr")[0]
    heard = []
    one = engine.answer(Asked(row["question"]), lambda number, event, data: heard.append((event, data)))
    written = [data for event, data in heard if event == "written"]
    assert written and written[-1] == one.said.text == one.written and one.said.letter == ""
    assert all(len(a) <= len(b) + 3 for a, b in zip(written, written[1:], strict=False))
    assert one.said.probability == pytest.approx(np.exp(-one.said.nll))
    assert not one.calibrated and not one.abstains and "give options" in one.why
    # The written answer scored as a continuation costs what writing it did.
    none = one.said.nll + one.effect
    assert one.nll_none == pytest.approx(none) and all(s.without is not None for s in one.passages)
    events = [event for event, _ in heard]
    assert events[0] == "passages" and events[-2:] == ["closed_book", "answer"]


def test_nothing_is_compiled_after_opening(run, engine):
    seen = []

    def count(event, duration_secs, **more):
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    rows = rows_of(run.directory, "jmlr")
    for number in (1, 2, 3, 5, 8):
        for arm in engine.arms:
            engine.answer_all([asked(row, arm) for row in rows[:number]])
    engine.answer_all([Asked("a", arm="jmlr"), Asked(" ".join(["which"] * 60), arm="jmlr")])
    engine.search("kidney", "jmlr", 7)
    engine.search("kidney", "bm25", 7)
    engine.embeddings(["kidney", "heart"], "jmlr")
    assert seen == []
    jax.jit(lambda x: x + 17)(np.ones(3))  # the counter counts
    assert seen


def test_one_that_cannot_be_asked_leaves_the_others_alone(run, engine):
    rows = rows_of(run.directory, "jmlr")
    long = Asked("x", ("word " * 8, "b"))
    found = engine.answer_all([asked(rows[0]), long, asked(rows[1], sources=("nowhere",)), asked(rows[1], k=9)])
    assert found[0].said.letter and "generator.answer_length is 12" in str(found[1])
    assert isinstance(found[2], SearchError) and "trained on at most 3" in str(found[3])
    with pytest.raises(AskError, match="passages drawn by chance|arm: random is not here"):
        engine.answer(asked(rows[0], "random"))


def test_what_nobody_waits_for_is_left_out(run, engine):
    rows = rows_of(run.directory, "jmlr")
    told = []
    found = engine.answer_all(
        [asked(row) for row in rows[:2]], lambda number, event, data: told.append((number, event)), lambda n: n == 1
    )
    assert found[0].said.letter and isinstance(found[1], Gone)
    assert (0, "written") in told and (1, "written") not in told and (1, "answer") not in told


def test_long_questions_lose_their_beginning(run, engine):
    one = engine.answer(Asked("first " + "word " * 200 + "last"))
    assert one.shortened and len(one.passages) == 3


def test_arms_of_a_run(run, engine):
    assert engine.arms == ("jmlr", BEFORE, "bm25", "closed_book")
    row = rows_of(run.directory, "jmlr")[0]
    before, bm25 = engine.answer(asked(row, BEFORE)), engine.answer(asked(row, "bm25"))
    assert before.passages != engine.answer(asked(row)).passages and not before.calibrated
    words = {one.text[s.start : s.end].lower() for one in bm25.passages for s in one.spans}
    assert words and all(word[:3] in row["question"].lower() for word in words)
    assert len(engine.home.examples()) == 12


def test_probabilities_and_abstention_come_from_dev(run, engine):
    dev = rows_of(run.directory, "jmlr", "dev")
    trust = engine.arm("jmlr").trust
    assert trust.temperature == pytest.approx(fit_temperature(options_of(dev))) and trust.questions == len(dev) == 8
    for row in rows_of(run.directory, "jmlr")[:3]:
        one = engine.answer(asked(row))
        want = probabilities(options_of([row]), trust.temperature)[0]
        assert [c.probability for c in one.said.choices] == pytest.approx(want.tolist(), abs=1e-4)
        assert one.abstains == (trust.least is None or one.said.probability < trust.least)
        assert (one.to_json(anyway=False)["said"] is None) == one.abstains and one.to_json()["said"] is not None
    stale = run.directory / "eval" / "dev" / "jmlr" / "made_from.json"
    text = stale.read_text()
    try:
        stale.unlink()
        assert "eval.split=dev" in RunHome(run).arm("jmlr").trust.uncalibrated
    finally:
        stale.write_text(text)


def test_when_an_answer_is_not_given():
    assert Trust(1.0, 0.6, 0.2, 50).abstains(0.59) and not Trust(1.0, 0.6, 0.2, 50).abstains(0.6)
    assert "no answer was sure enough" in Trust(1.0, None, 0.2, 50).abstains(0.99)
    assert Trust(uncalibrated="why").abstains(0.0) == ""
    assert "no dev question has options" in fitted([], 0.2).uncalibrated
    assert option_probabilities(["a", "b", "A."], [0.0, 1.0, 3.0], 1.0)[2] == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"question": " "}, "question: is empty"),
        ({"question": "x" * (MAX_QUESTION + 1)}, f"at most {MAX_QUESTION}"),
        ({"question": "a\x00b"}, r"U\+0000"),
        ({"question": "\ud800"}, r"U\+D800"),
        ({"question": "x", "options": ("a",)}, "2 to 10"),
        ({"question": "x", "options": tuple("abcdefghijk")}, "2 to 10"),
        ({"question": "x", "options": ("a", "")}, "option B: is empty"),
        ({"question": "x", "k": 0}, "k: 0"),
    ],
)
def test_what_is_no_question(fields, said):
    with pytest.raises(AskError, match=said):
        Asked(**fields)


def test_command_line(run, patch, capsys, monkeypatch):
    row, where = rows_of(run.directory, "jmlr")[0], ["--run-dir", str(run.directory)]
    options = [word for text in row["option_texts"] for word in ("--option", text)]
    assert cli.main(["ask", row["question"], *options, *where, "--json", "--answer-anyway"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 1 and [c["nll"] for c in found["choices"]] == pytest.approx(row["option_nll"], abs=1e-4)
    assert cli.main(["ask", row["question"], *options, *where, "--answer-anyway"]) == 0
    out = capsys.readouterr().out
    assert found["said"]["text"] in out and "not medical advice" in out and out.index("[3]") < out.index("[1]")
    lines = f"{row['question']} | {' | '.join(row['option_texts'])}\n\n | a | b\n{row['question']}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(["ask", *where, "--json", "--answer-anyway", "--arm", "bm25"]) == 0
    said = capsys.readouterr()
    first, refused, last = map(json.loads, said.out.splitlines())
    assert [len(answer["choices"]) for answer in (first, last)] == [4, 0] and "line 3: question: is empty" in said.err
    assert refused["error"]["message"] == "question: is empty; say what is asked" and refused["options"] == ["a", "b"]
    with monkeypatch.context() as without:
        without.setattr("jmlr_jax.commands.ask.open_home", None)
        assert cli.main(["ask", " ", *where]) == 2
    assert "question: is empty" in capsys.readouterr().err
    assert cli.main(["ask", "x", *where, "--arm", "separate"]) == 2
    assert "there are jmlr, before, bm25, closed_book" in capsys.readouterr().err


def test_rows_are_few_sizes(engine):
    assert ROWS[0] == 1 and len(ROWS) * len(engine.rows.widths) <= 9


@pytest.mark.exhaustive
def test_an_export_with_its_index_answers_alike_from_anywhere(run, engine, patch, tmp_path, capsys):
    target = tmp_path / "made" / "here"
    words = ["export", str(run.directory), str(target), "--with-index"]
    assert cli.main(words) == 0 and cli.main([*words[:2], str(tmp_path / "b"), "--with-index", "--arm", "bm25"]) == 0
    moved = tmp_path / "elsewhere"
    target.rename(moved)
    text = (moved / "config.yaml").read_text() + (moved / "data" / "prepare.json").read_text()
    assert str(run.directory) not in text and not list((moved / "data").glob("questions*"))
    row = rows_of(run.directory, "jmlr")[0]
    options = [word for text in row["option_texts"] for word in ("--option", text)]
    for arm, folder in (("jmlr", moved), ("bm25", tmp_path / "b")):
        capsys.readouterr()
        assert cli.main(["ask", row["question"], *options, "--run-dir", str(folder), "--json"]) == 0
        found, want = json.loads(capsys.readouterr().out), engine.answer(asked(row, arm)).to_json(anyway=False)
        assert found["arm"] == arm and found["why"] == want["why"] and found["threshold"] == want["threshold"]
        assert [c["nll"] for c in found["choices"]] == pytest.approx([c["nll"] for c in want["choices"]], abs=1e-4)
        assert [p["id"] for p in found["passages"]] == [p["id"] for p in want["passages"]]
    assert cli.main(["ask", "x", "--run-dir", str(moved), "--arm", "bm25"]) == 2
    (moved / "answering.json").write_text("{}")
    assert cli.main(["ask", "x", "--run-dir", str(moved)]) == 2
    said = capsys.readouterr().err
    assert "there are jmlr" in said and "answering.json: not readable" in said
