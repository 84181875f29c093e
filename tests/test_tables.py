"""Candidate tables: fixed ones, the mixture, and the refresh beside training."""

import threading

import jax
import numpy as np
import pytest
from runs import one_device, open_run

from jmlr_jax.retrieval.candidates import overlap
from jmlr_jax.run import candidates as module
from jmlr_jax.run import index as indexes
from jmlr_jax.run.candidates import Candidates, bm25_table, fixed_table
from jmlr_jax.run.index import keep_index, query_vectors, retriever_index
from jmlr_jax.run.open import Run


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        return open_run(tiny_data, tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def retriever(run):
    return run.initial_weights()["retriever"]


@pytest.fixture(scope="module")
def other_retriever(retriever):
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), retriever)


@pytest.fixture
def mesh(run):
    with jax.set_mesh(run.mesh):
        yield run.mesh


ROWS = np.arange(10)


def refreshed(run, folder, retriever, step=0, rows=ROWS) -> Candidates:
    candidates = Candidates(run, folder)
    candidates.start(step, retriever, rows)
    candidates.adopt()
    return candidates


def test_fixed_tables_of_each_source(run, retriever, mesh):
    count, passages = len(run.prepared.questions("train")), len(run.prepared.passages)
    made = {
        source: fixed_table(run, source, "train", 3, retriever) for source in ("none", "random", "bm25", "retriever")
    }
    for source, table in made.items():
        assert table.shape == (count, 3) and table.dtype == np.int32 and table.max() < passages, source
        again = fixed_table(run, source, "train", 3, retriever)
        np.testing.assert_array_equal(table, again)
    some = fixed_table(run, "retriever", "train", 3, retriever, rows=ROWS)
    np.testing.assert_array_equal(some[ROWS], made["retriever"][ROWS])
    assert (some[len(ROWS) :] == -1).all(), "nobody reads these"
    assert (made["none"] == -1).all()
    assert all(len(set(row)) == 3 for row in made["random"].tolist())
    np.testing.assert_array_equal(made["bm25"], bm25_table(run, "train", 3))
    assert overlap(made["random"], made["bm25"]) < 0.1 and overlap(made["random"], made["retriever"]) < 0.5
    assert (
        fixed_table(run, "random", "test", 3).tolist() != made["random"][: len(run.prepared.questions("test"))].tolist()
    )


def test_the_answer_makes_lexical_search_find_the_gold_passage(run):
    gold = np.array(run.gold("train"))[:, 0]
    alone, with_answer = (bm25_table(run, "train", 1, with_answer=w)[:, 0] for w in (False, True))
    assert np.mean(with_answer == gold) > 2 * np.mean(alone == gold)


def test_the_mixture_has_its_shares_and_is_reproducible(run, retriever, mesh, tmp_path):
    candidates = refreshed(run, tmp_path / "a", retriever)
    mix = run.cfg.train.mix
    assert candidates.dev_nxK.shape == (4, 4) and run.dev_rows.tolist() != [0, 1, 2, 3]
    for split, rows, table in (("train", ROWS, candidates.train_NxK[ROWS]), ("dev", run.dev_rows, candidates.dev_nxK)):
        retrieved = fixed_table(run, "retriever", split, mix.index, retriever)[rows]
        lexical = bm25_table(run, split, 8)[rows]
        for row, found, words in zip(table.tolist(), retrieved.tolist(), lexical.tolist(), strict=True):
            assert len(set(row)) == 4 and -1 not in row
            assert set(found) <= set(row), split
            # The best lexical passage that retrieval has not taken already.
            assert next(p for p in words if p not in found) in row, split
    assert (candidates.train_NxK[len(ROWS) :] == -1).all()
    again = refreshed(run, tmp_path / "b", retriever)
    np.testing.assert_array_equal(candidates.train_NxK, again.train_NxK)
    later = refreshed(run, tmp_path / "c", retriever, step=4)
    assert (later.train_NxK != again.train_NxK).any()  # chance passages are drawn anew


def test_a_refresh_file_is_read_again_only_for_the_retriever_and_questions_it_came_from(
    run, retriever, other_retriever, mesh, tmp_path, monkeypatch
):
    first = refreshed(run, tmp_path, retriever)
    made = []
    original = module.retriever_index
    monkeypatch.setattr(module, "retriever_index", lambda *a, **k: made.append(1) or original(*a, **k))
    np.testing.assert_array_equal(refreshed(run, tmp_path, retriever).train_NxK, first.train_NxK)
    assert not made
    other = refreshed(run, tmp_path, other_retriever)
    assert len(made) == 1 and (other.train_NxK != first.train_NxK).any()
    refreshed(run, tmp_path, other_retriever, rows=ROWS[:5])
    assert len(made) == 2


def test_staleness_and_recall_of_an_adoption(run, retriever, other_retriever, mesh, tmp_path):
    candidates = refreshed(run, tmp_path, retriever)
    gold = run.gold("train")
    hits = [gold[row][0] in candidates.train_NxK[row] for row in ROWS]
    assert candidates.metrics["recall/candidates"] == pytest.approx(np.mean(hits))
    assert "index/staleness" not in candidates.metrics  # nothing was there before
    before = candidates.train_NxK[ROWS].copy()
    candidates.start(4, other_retriever, ROWS)
    candidates.adopt()
    assert candidates.metrics["index/staleness"] == pytest.approx(1 - overlap(before, candidates.train_NxK[ROWS]))
    assert 0 < candidates.metrics["index/staleness"] < 1


def test_a_slow_refresh_is_waited_for_and_a_fast_one_is_not_adopted_early(
    run, retriever, other_retriever, mesh, tmp_path, monkeypatch
):
    candidates = refreshed(run, tmp_path, retriever)
    before = candidates.train_NxK.copy()
    go, original = threading.Event(), module.retriever_index

    def slow(*args, **kwargs):
        assert go.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "retriever_index", slow)
    candidates.start(4, other_retriever, ROWS)
    assert int(candidates.state()["pending"]) == 4 and not (tmp_path / "step_0000004.npz").exists()
    before_waiting = candidates.seconds()
    threading.Timer(0.2, go.set).start()
    candidates.wait()  # as before a checkpoint
    after = candidates.seconds()
    waited, beside = "speed/refresh_wait_fraction", "speed/refresh_fraction"
    assert after[waited] - before_waiting[waited] > 0.19 and after[beside] > 0.19
    assert candidates.seconds()[beside] == after[beside]  # stands still between refreshes
    assert (tmp_path / "step_0000004.npz").exists()
    np.testing.assert_array_equal(candidates.train_NxK, before)  # finished, not adopted
    resumed = Candidates(run, tmp_path)
    resumed.restore(candidates.state(), {})
    candidates.adopt()
    assert (candidates.train_NxK != before).any() and int(candidates.state()["pending"]) == -1
    monkeypatch.setattr(module, "retriever_index", lambda *a, **k: pytest.fail("made again"))
    resumed.adopt()
    np.testing.assert_array_equal(resumed.train_NxK, candidates.train_NxK)
    np.testing.assert_array_equal(resumed.dev_nxK, candidates.dev_nxK)


class ChangedCorpus:
    """Prepared data in which the corpus is made of these passages of the old one."""

    def __init__(self, prepared, rows, name):
        self._old, self._rows = prepared, rows
        self.passages = [prepared.passages[int(row)] for row in rows]
        self.card = prepared.card | {"fingerprints": prepared.card["fingerprints"] | {"passages": name}}

    def __getattr__(self, name):
        return getattr(self._old, name)

    def passage_tokens(self, rows):
        return self._old.passage_tokens(self._rows[rows])


@pytest.mark.parametrize("share, kept", [(0.01, True), (0.4, False)])
def test_an_index_of_an_earlier_corpus_is_brought_up_to_date(run, retriever, mesh, tmp_path, monkeypatch, share, kept):
    """One passage is new and some are gone: only the new one is encoded, unless too many are gone."""
    count = len(run.prepared.passages)
    gone = round(share * count)

    def of(prepared, directory=tmp_path):
        return Run(run.cfg, directory, prepared, run.mesh)

    old = ChangedCorpus(run.prepared, np.arange(count - 1), "old")
    new = ChangedCorpus(run.prepared, np.roll(np.arange(gone, count), 3), "new")
    keep_index(of(old), "initial", retriever, list)
    read, original, said = [], indexes.encode_passages_batched, []

    def encode(encode, params, cfg, tokens, rows, *rest, **named):
        read.extend(rows.tolist())
        return original(encode, params, cfg, tokens, rows, *rest, **named)

    monkeypatch.setattr(indexes, "encode_passages_batched", encode)
    index = keep_index(of(new), "initial", retriever, said.append)
    assert said == [f"{tmp_path}/index/initial: made again, passages has changed"]
    assert set(read) == ({new._rows.tolist().index(count - 1)} if kept else set(range(count - gone)))
    assert (index.card.updates, index.card.corpus_fingerprint) == (int(kept), "new")
    read.clear()
    again = retriever_index(of(new), retriever)
    assert not read, "opened as it is"
    q = np.concatenate(list(query_vectors(run, retriever, "train", ROWS)))
    want = retriever_index(of(new, tmp_path / "else"), retriever)
    for one in (index, again):
        rows, scores = one.search(q, 5)
        np.testing.assert_array_equal(rows, want.search(q, 5)[0])
        np.testing.assert_allclose(scores, want.search(q, 5)[1], rtol=1e-3)


def test_without_dev_questions_there_is_no_empty_table_to_save(tiny_data, tmp_path, monkeypatch):
    one_device(monkeypatch)
    candidates = Candidates(open_run(tiny_data, tmp_path, train={"dev_questions": 0}), tmp_path / "tables")
    assert all(x.size for x in candidates.state().values())
    candidates.restore(candidates.state(), {})
    assert candidates.dev_nxK.shape == (0, 4)
