"""Exact and ScaNN indexes and the directory they are kept in; ScaNN is the real one."""

import doctest
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval import exact, scann, store
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.scann import ScannIndex, ScannSettings
from jmlr_jax.retrieval.store import IndexUnusable, build_index, open_index, params_fingerprint
from jmlr_jax.retrieval.vectors import TokenVectors

DIM, TOKENS, QUERY_TOKENS = 16, 8, 5
CFG = IndexConfig(kind="scann", rerank=40, fde_repetitions=8, fde_simhash_bits=3, fde_projection=8, fde_final=256)


def clustered(n, questions, seed=0):
    """Passages around 30 topics, each token near its topic or anywhere; questions near tokens of one passage."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(30, DIM))
    p = topics[rng.integers(0, 30, n)][:, None] + 0.8 * rng.normal(size=(n, TOKENS, DIM))
    p /= np.linalg.norm(p, axis=-1, keepdims=True)
    keep = np.arange(TOKENS) < rng.integers(3, TOKENS + 1, n)[:, None]
    source = rng.integers(0, n, questions)
    q = p[source][:, rng.integers(0, 3, QUERY_TOKENS)] + 0.15 * rng.normal(size=(questions, QUERY_TOKENS, DIM))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    return TokenVectors(p.astype(np.float16), keep), q.astype(np.float32)


def all_scores(vectors, q):
    """MaxSim of every pair, in numpy float64."""
    p = vectors.vectors_NxPxC.astype(np.float64)
    similarity = np.einsum("bqc,npc->bnqp", q.astype(np.float64), p)
    return np.where(vectors.keep_NxP[:, None], similarity, -np.inf).max(-1).sum(-1)


def recall_of(got, want):
    return np.mean([len(set(g) & set(w)) / len(w) for g, w in zip(got, want, strict=True)])


def build(vectors, q, kind="scann", **changes):
    return build_index(
        vectors,
        CFG.model_copy(update={"kind": kind, **changes}),
        model_fingerprint="model-a",
        corpus_fingerprint="corpus-a",
        sample_q_NxQxC=q,
        recall_at=(1, 10),
    )


def test_docstrings():
    for module, attempted in ((exact, 2), (scann, 3), (store, 3)):
        assert doctest.testmod(module) == (0, attempted)


@pytest.mark.parametrize("similarity_bytes", [2**30, 40_000])
def test_exact_equals_numpy(monkeypatch, similarity_bytes):
    """One block, and many of which the last is short."""
    monkeypatch.setattr(exact, "SIMILARITY_BYTES", similarity_bytes)
    vectors, q = clustered(203, 13)
    truth = all_scores(vectors, q)
    rows, scores = ExactIndex(vectors).search(q, 6)
    assert rows.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, np.argsort(-truth, axis=1, kind="stable")[:, :6])
    np.testing.assert_allclose(scores, -np.sort(-truth, axis=1)[:, :6], rtol=1e-5)


def test_exact_blocks_cover_the_case_above():
    assert exact.block_size(203, QUERY_TOKENS, TOKENS) == 203
    assert 40_000 // (4 * exact.QUERY_BATCH * QUERY_TOKENS * TOKENS) == 31  # 203 = 6 * 31 + 17


def test_equal_scores_keep_corpus_order(monkeypatch):
    monkeypatch.setattr(exact, "SIMILARITY_BYTES", 10_000)
    vectors, q = clustered(1, 2)
    same = TokenVectors(np.repeat(vectors.vectors_NxPxC, 40, axis=0), np.repeat(vectors.keep_NxP, 40, axis=0))
    np.testing.assert_array_equal(ExactIndex(same).search(q, 12)[0], [range(12)] * 2)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_k_above_the_corpus_is_padded(kind):
    """Fault 14: -1 on the right, every passage once."""
    vectors, q = clustered(7, 3)
    rows, scores = build(vectors, q, kind).search(q, 11)
    assert rows.shape == scores.shape == (3, 11)
    for row in rows:
        assert sorted(row[:7]) == list(range(7))
    assert np.all(rows[:, 7:] == -1) and np.all(np.isneginf(scores[:, 7:]))


def test_filling_of_a_short_block_is_no_passage(monkeypatch):
    """7 passages in blocks of 3: the last block is filled up, and the filling must not be found."""
    monkeypatch.setattr(exact, "SIMILARITY_BYTES", 3 * 4 * exact.QUERY_BATCH * QUERY_TOKENS * TOKENS)
    vectors, q = clustered(7, 3)
    rows, scores = ExactIndex(vectors).search(q, 9)
    assert all(sorted(row[:7]) == list(range(7)) for row in rows)
    assert np.all(rows[:, 7:] == -1) and np.all(np.isneginf(scores[:, 7:]))


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_wrong_queries_are_refused(kind):
    vectors, q = clustered(30, 3)
    index = build(vectors, q, kind)
    with pytest.raises(ValueError, match=r"\[N, Q, 16\]"):
        index.search(q[..., :5], 3)
    with pytest.raises(ValueError, match="k=0"):
        index.search(q, 0)
    assert index.search(q[:0], 4)[0].shape == (0, 4)


@pytest.mark.parametrize(
    "how", [ScannSettings(None, None, False), ScannSettings(None, None, True), ScannSettings(40, 20, True)]
)
def test_scann_finds_what_the_oracle_finds(how):
    """Brute force, quantised, and tree: re-ranked by exact MaxSim, with exact scores."""
    vectors, q = clustered(1500, 40)
    truth = all_scores(vectors, q)
    rows, scores = ScannIndex.build(vectors, CFG, 0, how).search(q, 5)
    assert recall_of(rows, np.argsort(-truth, axis=1)[:, :5]) > 0.8
    np.testing.assert_allclose(scores, np.take_along_axis(truth, rows, axis=1), rtol=1e-5)
    assert np.all(np.diff(scores, axis=1) <= 0)


def test_scann_short_tree_search_is_padded():
    """One leaf searched of many: fewer hits than asked for come back as -1, never as row 0 repeated."""
    vectors, q = clustered(1500, 10)
    index = ScannIndex.build(vectors, CFG.model_copy(update={"rerank": 400}), 0, ScannSettings(60, 1, True))
    rows, scores = index.search(q, 400)
    assert np.any(rows == -1)
    for row, score in zip(rows, scores, strict=True):
        found = row[row >= 0]
        assert len(set(found)) == len(found) and np.all(row[len(found) :] == -1)
        assert np.all(np.isfinite(score[: len(found)])) and np.all(np.isneginf(score[len(found) :]))


def test_more_hits_than_rerank_when_k_asks_for_them():
    vectors, q = clustered(300, 3)
    index = ScannIndex.build(vectors, CFG, 0, ScannSettings(None, None, True))
    assert np.all(index.search(q, 250)[0] >= 0)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_saved_index_answers_the_same(kind, tmp_path, monkeypatch):
    """Also after the directory moved and the working directory changed; vectors stay on disk."""
    vectors, q = clustered(120, 6)
    index = build(vectors, q, kind)
    index.save(tmp_path / "here")
    os.rename(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    again = open_index("there", "model-a", "corpus-a")
    assert isinstance(again.vectors.vectors_NxPxC, np.memmap)
    for got, want in zip(again.search(q, 9), index.search(q, 9), strict=True):
        np.testing.assert_array_equal(got, want)
    assert again.card == index.card


def test_card(tmp_path):
    vectors, q = clustered(200, 20)
    index = build(vectors, q, oracle_queries=15)
    index.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    want = all_scores(vectors, q[:15])
    got, _ = index.search(q[:15], 10)
    assert card["kind"] == "scann" and card["oracle_queries"] == 15
    assert card["recall"]["10"] == pytest.approx(recall_of(got, np.argsort(-want, axis=1)[:, :10]))
    assert card["recall"]["1"] == pytest.approx(recall_of(got[:, :1], np.argsort(-want, axis=1)[:, :1]))
    assert [card["passages"], card["passage_tokens"], card["dim"]] == [200, TOKENS, DIM]
    assert card["total_bytes"] == sum(f.stat().st_size for f in (tmp_path / card["data_dir"]).rglob("*") if f.is_file())
    assert build(vectors, q, "exact").card.recall == {}


def test_auto_chooses_by_size():
    vectors, q = clustered(50, 2)
    assert build(vectors, q, "auto", exact_below=51).card.kind == "exact"
    assert build(vectors, q, "auto", exact_below=50).card.kind == "scann"


@pytest.fixture
def saved(tmp_path):
    vectors, q = clustered(60, 2)
    build(vectors, q).save(tmp_path / "index")
    return tmp_path / "index"


def data_dir(saved):
    return saved / json.loads((saved / "card.json").read_text())["data_dir"]


def test_another_model_or_corpus_is_refused(saved):
    with pytest.raises(IndexUnusable, match="another retriever.*build the index again"):
        open_index(saved, "model-b", "corpus-a")
    with pytest.raises(IndexUnusable, match="another corpus"):
        open_index(saved, "model-a", "corpus-b")
    with pytest.raises(IndexUnusable, match="card.json is missing"):
        open_index(saved.parent, "model-a", "corpus-a")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["vectors.npy", "keep.npy", "fde.npz", "scann/dataset.npy"])
@pytest.mark.parametrize(
    "damage, message", [(truncate, "were written"), (flip, "contents changed"), (os.remove, "missing")]
)
def test_damaged_files_are_refused(saved, name, damage, message):
    damage(data_dir(saved) / name)
    with pytest.raises(IndexUnusable, match=rf"{name}.*{message}"):
        open_index(saved, "model-a", "corpus-a")


def test_unknown_files_are_refused(saved):
    """ScaNN would unpickle this one."""
    (data_dir(saved) / "scann" / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(IndexUnusable, match="scann_docids.pkl: not part"):
        open_index(saved, "model-a", "corpus-a")


@pytest.mark.parametrize("change", [{"data_dir": "../data-x"}, {"kind": "faiss"}, {"passages": 61}, {"surplus": 1}])
def test_broken_cards_are_refused(saved, change):
    card = json.loads((saved / "card.json").read_text()) | change
    (saved / "card.json").write_text(json.dumps(card))
    with pytest.raises(IndexUnusable, match="build the index again"):
        open_index(saved, "model-a", "corpus-a")
    (saved / "card.json").write_text("{")
    with pytest.raises(IndexUnusable, match="not a readable index card"):
        open_index(saved, "model-a", "corpus-a")


@pytest.mark.parametrize("call", ["save", "_entry", "replace"])
def test_failed_save_leaves_the_previous_index(saved, call, monkeypatch):
    """The disk fills up while the searcher, the checksums or the card are written."""
    vectors, q = clustered(40, 2, seed=9)
    before = open_index(saved, "model-a", "corpus-a").search(q, 5)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    owner = {"save": ScannIndex, "_entry": store, "replace": store.os}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(OSError, match="no space left"):
            build(vectors, q).save(saved)
    after = open_index(saved, "model-a", "corpus-a")
    assert len(after.vectors) == 60
    np.testing.assert_array_equal(after.search(q, 5)[0], before[0])
    assert sorted(p.name for p in saved.iterdir()) == sorted(["card.json", data_dir(saved).name])


def test_new_index_replaces_the_old_one(saved):
    vectors, q = clustered(40, 2, seed=9)
    build(vectors, q).save(saved)
    assert len(open_index(saved, "model-a", "corpus-a").vectors) == 40
    assert len(list(saved.iterdir())) == 2


def test_vectors_of_other_types_are_refused():
    vectors, _ = clustered(5, 1)
    with pytest.raises(ValueError, match="float32"):
        TokenVectors(vectors.vectors_NxPxC.astype(np.float32), vectors.keep_NxP)
    with pytest.raises(ValueError, match="no passages"):
        TokenVectors(vectors.vectors_NxPxC[:0], vectors.keep_NxP[:0])


def test_params_fingerprint_sees_every_change():
    tree = {"a": {"w": jnp.arange(4.0)}, "b": np.zeros(2, np.int32)}
    same = params_fingerprint(tree)
    assert same == params_fingerprint(jax.tree.map(np.asarray, tree))
    others = [
        {"a": {"w": jnp.arange(4.0).at[3].add(1e-6)}, "b": tree["b"]},
        {"a": {"w": jnp.arange(4.0).reshape(2, 2)}, "b": tree["b"]},
        {"a": {"w": jnp.arange(4.0)}, "b": np.zeros(2, np.float32)},
        {"a": {"v": jnp.arange(4.0)}, "b": tree["b"]},
        {"a": {"w": jnp.arange(4.0, dtype=jnp.bfloat16)}, "b": tree["b"]},
    ]
    assert len({same, *map(params_fingerprint, others)}) == 6
