"""Passages added, replaced, moved and deleted without a rebuild."""

import numpy as np
import pytest
from indexes import all_scores, build, clustered, digests_of, recall_of

from jmlr_jax.retrieval.build import changed_fraction, update_index
from jmlr_jax.retrieval.store import IndexUnusable, open_index
from jmlr_jax.retrieval.vectors import TokenVectors

EVERYTHING = {"rerank": 400, "oracle_queries": 4}  # all passages are scored: results do not hang on ScaNN's training


def joined(*parts):
    return TokenVectors(np.concatenate([p.vectors_NxPxC for p in parts]), np.concatenate([p.keep_NxP for p in parts]))


def updated(index, corpus, asked=None, corpus_fingerprint="corpus-b"):
    def encode(rows):
        if asked is not None:
            asked.extend(rows.tolist())
        half = len(rows) // 2
        return [corpus.rows(part) for part in (rows[:half], rows[half:]) if len(part)]

    return update_index(index, digests_of(corpus), encode, corpus_fingerprint=corpus_fingerprint)


@pytest.fixture(scope="module")
def world():
    """An old corpus of 200, and a new one: 40 deleted, 20 replaced, 30 added in front, the rest moved."""
    old, q = clustered(200, 30)
    other, _ = clustered(50, 1, seed=5)
    kept = joined(old.rows(slice(100, 200)), old.rows(slice(0, 40)))
    new = joined(other.rows(slice(0, 30)), kept, other.rows(slice(30, 50)))
    return old, new, q


@pytest.mark.parametrize("kind, bits", [("exact", 16), ("scann", 16), ("scann", 4)])
def test_an_updated_index_answers_as_a_rebuilt_one(world, kind, bits):
    old, new, q = world
    asked = []
    index = updated(build(old, q, kind, digests_of(old), bits=bits, **EVERYTHING), new, asked)
    assert asked == [*range(30), *range(170, 190)]  # nothing that was there is encoded again
    rows, scores = index.search(q, 10)
    truth = all_scores(new, q)
    want = np.argsort(-truth, axis=1, kind="stable")[:, :10]
    if bits == 16:
        np.testing.assert_array_equal(rows, want)
        np.testing.assert_allclose(scores, np.take_along_axis(truth, rows, 1), rtol=1e-4)
    else:  # the code was learned on the old corpus
        rebuilt = build(new, q, kind, digests_of(new), bits=bits, **EVERYTHING).search(q, 10)[0]
        assert recall_of(rows, want) > recall_of(rebuilt, want) - 0.05
    card = index.card
    assert [card.passages, card.updates, card.corpus_fingerprint] == [190, 1, "corpus-b"]
    assert card.entries == (190 if kind == "exact" else 250)


def test_deleted_passages_are_never_returned(world):
    """Even when a question is the deleted passage itself and everything there is is asked for."""
    old, _, _ = world
    index = build(old, np.zeros((0, 5, 16), np.float32), digests=digests_of(old))
    gone = np.arange(200) % 2 == 0
    left = updated(index, old.rows(np.flatnonzero(~gone)))
    q = old.vectors_NxPxC[gone][:60, :3].astype(np.float32)  # their own first tokens
    rows, scores = left.search(q, 200)
    assert rows.max() < 100 and (rows >= 0).sum(1).tolist() == [100] * 60
    truth = all_scores(old.rows(np.flatnonzero(~gone)), q)
    np.testing.assert_allclose(scores[:, :100], -np.sort(-truth, axis=1), atol=1e-4)


def test_a_passage_that_comes_back_is_not_encoded_again(world):
    old, _, q = world
    index = build(old, q, digests=digests_of(old))
    asked = []
    without = updated(index, old.rows(slice(0, 150)), asked)
    again = updated(without, old, asked, "corpus-a")
    assert asked == [] and again.card.entries == 200 and again.card.updates == 2
    np.testing.assert_array_equal(again.search(q, 5)[0], index.search(q, 5)[0])


def test_equal_passages_each_have_their_row(world):
    old, _, q = world
    index = build(old, q, digests=digests_of(old))
    twice = joined(old, old.rows(slice(0, 3)))
    rows, scores = updated(index, twice).search(old.vectors_NxPxC[:3, :2].astype(np.float32), 203)
    assert np.array_equal(np.sort(rows, 1), np.tile(np.arange(203), (3, 1)))


def test_an_update_writes_only_what_is_new(world, tmp_path):
    old, new, q = world
    build(old, q, digests=digests_of(old), **EVERYTHING).save(tmp_path)
    opened = open_index(tmp_path, "model-a", None)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / opened.card.parts[0].name).rglob("*")}
    changed = updated(opened, new)
    want = changed.search(q, 10)
    changed.save(tmp_path)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    again = open_index(tmp_path, "model-a", "corpus-b")
    assert len(again.card.parts) == 2 and again.card == changed.card
    assert len(list(tmp_path.iterdir())) == 4  # the card, two parts, the state
    for got, wanted in zip(again.search(q, 10), want, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert (tmp_path / again.card.state.name / "tradeoff.png").exists()
    # Elsewhere everything is written.
    again.save(tmp_path / "copy")
    np.testing.assert_array_equal(open_index(tmp_path / "copy", "model-a", "corpus-b").search(q, 10)[0], want[0])


def test_how_much_an_update_would_change(world):
    old, new, q = world
    index = build(old, q, digests=digests_of(old))
    assert changed_fraction(index, digests_of(old)) == 0
    assert changed_fraction(index, digests_of(new)) == pytest.approx(1 - 140 / 250)  # 50 new, 60 dead
    assert changed_fraction(updated(index, new), digests_of(new)) == pytest.approx(1 - 140 / 250)
    assert changed_fraction(build(old, q), digests_of(old)) == 1


def test_filters_hold_after_an_update(world):
    old, new, q = world
    index = updated(build(old, q, digests=digests_of(old)), new)
    allowed = np.arange(190) % 19 == 4
    rows, _ = index.search(q, 10, allowed)
    assert np.array_equal(np.sort(rows, 1), np.tile(np.flatnonzero(allowed), (30, 1)))


def test_what_cannot_be_updated_is_refused(world):
    old, new, q = world
    with pytest.raises(IndexUnusable, match="without digests.*build the index again"):
        updated(build(old, q), new)
    index = build(old, q, digests=digests_of(old))
    with pytest.raises(ValueError, match="uint8"):
        update_index(index, np.zeros((3, 4), np.uint8), lambda rows: [], corpus_fingerprint="b")
    with pytest.raises(ValueError, match="no passages"):
        update_index(index, np.zeros((0, 16), np.uint8), lambda rows: [], corpus_fingerprint="b")
