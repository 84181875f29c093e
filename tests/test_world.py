"""The embedded world: reproducible, split by condition, closed to word matching and to guessing, open to a reader."""

import collections

import numpy as np
import pytest

from jmlr_jax.config import WorldConfig
from jmlr_jax.data import world as module
from jmlr_jax.data.schema import SPLITS
from jmlr_jax.data.world import LAY_ORGANS, LAY_PROCESSES, RELATIONS, World, make_world
from jmlr_jax.retrieval.bm25 import BM25

LAY = {*LAY_ORGANS, *LAY_PROCESSES}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldConfig(), seed=3)


@pytest.fixture(scope="module")
def passages(world):
    return {passage.id: passage for passage in world.passages}


def all_questions(world):
    return [q for split in SPLITS for q in world.questions[split]]


def lay_pair(question) -> tuple[str, ...]:
    """The two lay words of the condition that a question asks about."""
    return tuple(word for word in question.question.split() if word in LAY)


def test_a_seed_decides_everything():
    small = WorldConfig(conditions=40)
    assert make_world(small, 5) == make_world(small, 5)
    one, other = make_world(small, 5), make_world(small, 6)
    assert {p.title for p in one.passages}.isdisjoint(
        p.title for p in other.passages if p.title not in lay_titles(other)
    )
    assert [q.question for q in all_questions(one)] != [q.question for q in all_questions(other)]


def lay_titles(world):
    return {p.title for p in world.passages if p.id.endswith("-trap")}


def test_counts_are_those_of_the_configuration(world):
    cfg = WorldConfig()
    assert world.stats["conditions"] == cfg.conditions == len({q.meta["group"] for q in all_questions(world)})
    conditions = {split: len({q.meta["group"] for q in world.questions[split]}) for split in SPLITS}
    assert conditions["test"] == world.stats["test_conditions"]
    assert conditions["dev"] + conditions["test"] == pytest.approx(cfg.test_fraction * cfg.conditions, abs=1)
    assert len(world.questions["train"]) == conditions["train"] * len(RELATIONS) * 3
    assert len(world.questions["test"]) == conditions["test"] * len(RELATIONS)
    traps = sum(p.id.endswith("-trap") for p in world.passages)
    assert traps == pytest.approx(cfg.trap_probability * cfg.conditions * len(RELATIONS), rel=0.1)
    assert len(world.passages) - traps == cfg.conditions * len(RELATIONS)


def test_splits_share_no_condition_and_test_has_no_part_unseen_in_training(world):
    pairs = {split: {lay_pair(q) for q in world.questions[split]} for split in SPLITS}
    assert all(len(pair) == 2 for found in pairs.values() for pair in found)
    assert not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["dev"] and not pairs["dev"] & pairs["test"]
    seen = {part for pair in pairs["train"] for part in pair}
    for split in ("dev", "test"):
        assert {part for pair in pairs[split] for part in pair} <= seen


def test_the_smallest_world_keeps_every_part_in_training():
    small = make_world(WorldConfig(conditions=64, values=8), seed=1)
    seen = {part for q in small.questions["train"] for part in lay_pair(q)}
    assert small.questions["test"] and {part for q in small.questions["test"] for part in lay_pair(q)} <= seen


def test_options_are_four_different_ones_with_the_answer_at_any_place(world):
    places = collections.Counter()
    for question in all_questions(world):
        assert len(set(question.options)) == 4 and question.options[question.answer_index] == question.answer
        places[question.answer_index] += 1
    assert min(places.values()) > 0.22 * sum(places.values())


def test_the_gold_passage_states_the_answer_and_the_formal_name_and_no_other_option(world, passages):
    for question in all_questions(world):
        (gold,) = (passages[doc] for doc in question.gold_doc_ids)
        words = gold.text.split()
        assert question.answer in words and gold.title in gold.text
        assert not {*question.options} - {question.answer} & {*words}, question.id
        assert gold.id == f"{question.meta['group']}-{question.kind}"


def test_no_formal_word_in_a_question_and_no_value_outside_the_fact_that_has_it(world, passages):
    formal = {word for p in world.passages if not p.id.endswith("-trap") for word in p.title.split()}
    values = {option for q in all_questions(world) for option in q.options}
    assert len(formal) == len(LAY) and not formal & LAY and not formal & values
    for question in all_questions(world):
        words = {*question.question.split()}
        assert not words & formal and not words & values
    for passage in world.passages:
        stated = values & {*passage.text.split()}
        assert len(stated) == (0 if passage.id.endswith("-trap") else 1), passage
        if passage.id.endswith("-trap"):
            assert not formal & {*passage.text.split(), *passage.title.split()}


def test_no_passage_gives_both_words_of_a_part_away(world):
    """A hint is one lay word beside a formal name of two parts: a dictionary has to be learned over many passages."""
    facts = [p for p in world.passages if not p.id.endswith("-trap")]
    assert not any(LAY & {*p.title.split()} for p in facts)
    hinted = np.mean([[word in p.text for word in ("it affects the", "there is")] for p in facts], axis=0)
    assert hinted == pytest.approx(WorldConfig().hint_probability, abs=0.03)


def bm25_recall_at_1(world) -> float:
    ids = [p.id for p in world.passages]
    found = BM25([f"{p.title} {p.text}" for p in world.passages]).search(
        [q.question for q in world.questions["test"]], 1
    )
    return float(
        np.mean([ids[row] in q.gold_doc_ids for row, q in zip(found[0][:, 0], world.questions["test"], strict=True)])
    )


def test_word_matching_does_not_solve_it_but_beats_chance(world):
    found = bm25_recall_at_1(world)
    assert 10 / len(world.passages) < found < 0.35


def test_with_lay_names_in_its_passages_word_matching_would_solve_it(monkeypatch):
    """What keeps the test above honest: it is the two languages that defeat BM25."""

    def lay(rng, n, syllables, endings, taken, made=module.words):
        words = made(rng, n, syllables, endings, taken)
        return {"ic": list(LAY_ORGANS), "osis": list(LAY_PROCESSES)}.get(endings[0], words)

    monkeypatch.setattr(module, "words", lay)
    assert bm25_recall_at_1(make_world(WorldConfig(hint_probability=0, trap_probability=0), seed=3)) > 0.45


def test_without_passages_an_answer_can_only_be_guessed(world):
    """Closed book: the option most often right in training, alone, with the organ, or with the process."""
    train, test = world.questions["train"], world.questions["test"]
    for known in (lambda q: (), lambda q: lay_pair(q)[:1], lambda q: lay_pair(q)[1:]):
        often = collections.Counter((q.kind, known(q), q.answer) for q in train)
        right = []
        for question in test:
            counts = np.array([often[question.kind, known(question), option] for option in question.options])
            right.append(np.mean(np.flatnonzero(counts == counts.max()) == question.answer_index))
        spread = np.sqrt(0.25 * 0.75 / len(test))
        assert np.mean(right) == pytest.approx(0.25, abs=4 * spread)


def test_sizes_that_cannot_be_are_refused():
    for conditions in (31, 577):
        with pytest.raises(ValueError, match=f"data.world.conditions={conditions}: expected 32 to 576"):
            make_world(WorldConfig(conditions=conditions), 0)
