"""The reading warm-up: renaming keeps what is to be read, lessons are reproducible, gold ids are not used."""

import dataclasses

import numpy as np
import pytest
from runs import one_device, open_run

from jmlr_jax.data.batches import Prepared, assemble
from jmlr_jax.training.warmup import ReadingLessons, rename

PIECES = ("reader_ids_BxKxL", "question_ids_BxS", "answer_ids_BxA")
ROWS = np.arange(8)
ALL = np.arange(len(ROWS))


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        return open_run(tiny_data, tmp_path_factory.mktemp("warmup"), train={"warmup": {"steps": 5}})


@pytest.fixture(scope="module")
def lessons(run):
    return ReadingLessons(run)


@pytest.fixture(scope="module")
def renamed(run, lessons):
    plain = assemble(run.prepared, "train", ROWS, lessons.distant[ROWS][:, :1])
    return plain, rename(plain, lessons.renamed, np.random.default_rng(0))


def test_renaming_is_one_bijection_of_the_answer_tokens_for_each_example(renamed, lessons):
    plain, other = renamed
    exchanges = []
    for b in range(len(ROWS)):
        pairs = {
            (int(x), int(y)) for n in PIECES for x, y in zip(plain[n][b].ravel(), other[n][b].ravel(), strict=True)
        }
        assert len({x for x, _ in pairs}) == len({y for _, y in pairs}) == len(pairs)  # both ways, in all pieces alike
        moved = {(x, y) for x, y in pairs if x != y}
        assert moved and {token for pair in moved for token in pair} <= set(lessons.renamed.tolist())
        exchanges.append(frozenset(moved))
    assert len(set(exchanges)) == len(ROWS)  # another one for each example


def test_renaming_leaves_the_retrievers_tokens_lengths_and_the_batch_it_was_given_alone(renamed, run, lessons):
    plain, other = renamed
    for name in set(plain) - set(PIECES):
        np.testing.assert_array_equal(plain[name], other[name])
    fresh = assemble(run.prepared, "train", ROWS, lessons.distant[ROWS][:, :1])
    for name in plain:
        np.testing.assert_array_equal(plain[name], fresh[name])


def test_special_tokens_are_never_renamed(run, lessons):
    ids = run.prepared.generator_ids
    assert len(lessons.renamed) and not {ids.pad, ids.bos, ids.eos} & set(lessons.renamed.tolist())


def test_common_words_keep_their_names_if_asked(lessons, run, monkeypatch):
    """With a limit exactly the answer tokens are exchanged that no more passages hold than it allows."""
    table = run.prepared.tokens("references")
    held = [set(table.ids[a:b].tolist()) for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True)]
    count = {token: sum(token in ids for ids in held) for token in lessons.renamed.tolist()}
    limit = float(np.median(list(count.values()))) / len(held)
    warmup = run.cfg.train.warmup.model_copy(update={"rename": limit})
    train = run.cfg.train.model_copy(update={"warmup": warmup})
    other = ReadingLessons(dataclasses.replace(run, cfg=run.cfg.model_copy(update={"train": train})))
    rare = [token for token, found in count.items() if 0 < found <= limit * len(held)]
    assert other.renamed.tolist() == rare and 0 < len(rare) < len(count)


def test_a_lesson_depends_on_seed_step_and_rows_alone(lessons, run):
    one, again, other = (
        lessons.batch(3, ROWS, ALL),
        ReadingLessons(run).batch(3, ROWS, ALL),
        lessons.batch(4, ROWS, ALL),
    )
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    assert any((one[name] != other[name]).any() for name in PIECES)
    assert one["reader_ids_BxKxL"].shape[1] == 1 and one["valid_BxK"].all()


@pytest.mark.parametrize("first, last", [(0.0, 0.0), (0.6, 0.6), (1.0, 0.0), (1.0, 1.0)])
def test_the_share_of_passages_found_with_the_answer(tiny_data, tmp_path, monkeypatch, first, last):
    one_device(monkeypatch)
    warmup = {"steps": 5, "distant_probability": (first, last), "rename": 0.0}
    lessons = ReadingLessons(open_run(tiny_data, tmp_path, train={"warmup": warmup}))
    seen = []
    monkeypatch.setattr("jmlr_jax.training.warmup.assemble", lambda _p, _s, rows, table: seen.append(table) or {})
    rows = np.arange(200)
    # Told apart: distant passages become negative numbers.
    lessons.distant = -2 - lessons.distant
    monkeypatch.setattr(lessons, "pick", lambda rng, table: (rng.random(), table[:, 0])[1])
    for step in range(5):
        lessons.batch(step, rows, np.arange(len(rows)))
    expected = [first + (last - first) * step / 5 for step in range(5)]
    np.testing.assert_allclose(np.mean(np.array(seen) < -1, axis=(1, 2)), expected, atol=0.1)


def test_a_row_without_passages_picks_none():
    table = np.array([[4, 5, -1], [-1, -1, -1]])
    picked = {tuple(ReadingLessons.pick(np.random.default_rng(i), table).tolist()) for i in range(20)}
    assert picked == {(4, -1), (5, -1)}


def test_gold_passages_are_not_used(run, monkeypatch):
    monkeypatch.setattr(Prepared, "gold", lambda *_: pytest.fail("training looked at the gold passages"))
    ReadingLessons(run).batch(0, ROWS, ALL)
