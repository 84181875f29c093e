"""An index saved in shards is asked as one."""

import shutil

import jax
import numpy as np
import pytest
from indexes import build, clustered

from jmlr_jax.retrieval import shards as module
from jmlr_jax.retrieval.shards import Shards, shard_fingerprint, shard_folder, shard_rows
from jmlr_jax.retrieval.store import IndexUnusable
from jmlr_jax.retrieval.tokens import best_of

PASSAGES, K = 83, 7
MINE = "model-a", "corpus-a", PASSAGES
VECTORS, Q = clustered(PASSAGES, 20)


def save(folder, count, kind="exact"):
    for number in range(count):
        rows = shard_rows(PASSAGES, number, count)
        index = build(VECTORS.rows(slice(rows.start, rows.stop)), Q, kind, rerank=PASSAGES)
        fingerprint = shard_fingerprint("corpus-a", rows, PASSAGES)
        index.card = index.card.model_copy(update={"corpus_fingerprint": fingerprint})
        index.save(shard_folder(folder, number, count))


@pytest.fixture(scope="module")
def whole():
    return build(VECTORS, Q, "exact")


@pytest.fixture
def three(tmp_path):
    save(tmp_path, 3)
    return tmp_path


@pytest.mark.parametrize("kind", ["exact", "scann"])
@pytest.mark.parametrize("count", [1, 3])
def test_shares_answer_as_the_whole(whole, tmp_path, kind, count):
    """Of ScaNN too, where it scores every passage."""
    save(tmp_path, count, kind)
    index = Shards.open(tmp_path, *MINE)
    assert len(index) == PASSAGES and len(index.held) == count
    some, first = np.arange(PASSAGES) % 5 == 2, np.arange(PASSAGES) < 10  # the first: of one shard alone
    for mask, k in ((None, K), (some, K), (some, PASSAGES), (first, K)):
        (rows, scores), (want_rows, want) = index.search(Q, k, mask), whole.search(Q, k, mask)
        np.testing.assert_array_equal(rows, want_rows)
        np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", [2, 5])
def test_every_shard_is_held_by_one_process(whole, three, monkeypatch, processes):
    """Fewer processes than shards, and more; what they would exchange is put together here."""
    found = []
    monkeypatch.setattr(module, "from_first", lambda act: act())
    monkeypatch.setattr(module, "gather", lambda said: [said])
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(Shards.open(three, *MINE).held_best(Q, K))
    row, score = (np.concatenate(list(x), axis=1) for x in zip(*found, strict=True))
    np.testing.assert_array_equal(best_of(row, score, K)[0], whole.search(Q, K)[0])


def test_the_layout_that_fits_is_taken(whole, three):
    """Beside shards of another build there may be a whole index, or shards of another number, of the right one."""
    for number in range(2):
        shutil.copytree(three / "shard_0_of_3", three / f"shard_{number}_of_2")
    for name in ("shard_x_of_y", "shard_0_of_4", f"shard_0_of_{PASSAGES + 1}"):
        shutil.copytree(three / "shard_0_of_3", three / name)
    assert len(Shards.open(three, *MINE).held) == 3
    whole.save(three)
    assert len(Shards.open(three, *MINE).held) == 1


def test_a_problem_of_one_process_is_told_by_all(three, monkeypatch):
    monkeypatch.setattr(module, "gather", lambda said: [said, "shard 1 is broken"])
    with pytest.raises(IndexUnusable, match="shard 1 is broken"):
        Shards.open(three, *MINE)


def test_questions_and_masks_of_other_forms_are_refused(three):
    index = Shards.open(three, *MINE)
    for q, k, mask, said in (
        (Q, K, np.ones(PASSAGES + 1, bool), "mask"),
        (Q, 0, None, "at least one"),
        (Q[..., :-1], K, None, "queries must be"),
    ):
        with pytest.raises(ValueError, match=said):
            index.search(q, k, mask)


def test_what_cannot_be_used_is_named(three, tmp_path):
    with pytest.raises(IndexUnusable, match="nowhere: no index here"):
        Shards.open(tmp_path / "nowhere", *MINE)
    with pytest.raises(IndexUnusable, match="shard_0_of_3.*another retriever"):
        Shards.open(three, "model-b", "corpus-a", PASSAGES)
    with pytest.raises(IndexUnusable, match="shard_0_of_3.*another corpus"):
        Shards.open(three, "model-a", "corpus-b", PASSAGES)
    with pytest.raises(IndexUnusable, match="shard_0_of_3.*another corpus"):
        Shards.open(three, "model-a", "corpus-a", PASSAGES + 1)
    file = next((three / "shard_1_of_3").glob("data-*/keep.npy"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IndexUnusable, match="shard_1_of_3.*bytes"):
        Shards.open(three, *MINE)
    shutil.rmtree(three / "shard_2_of_3")
    with pytest.raises(IndexUnusable, match="shard_2_of_3: no index here"):
        Shards.open(three, *MINE)
