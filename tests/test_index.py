"""Exact and ScaNN indexes and the directory they are kept in; ScaNN is the real one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from indexes import CFG, QUERY_TOKENS, TOKENS, all_scores, build, clustered, recall_of, scann_index

from jmlr_jax.retrieval import build as build_module
from jmlr_jax.retrieval import exact, scann, tune
from jmlr_jax.retrieval.build import build_index, sample_rows
from jmlr_jax.retrieval.exact import ExactIndex
from jmlr_jax.retrieval.scann import ScannIndex, ScannSettings
from jmlr_jax.retrieval.store import params_fingerprint
from jmlr_jax.retrieval.tune import Point, cheapest
from jmlr_jax.retrieval.vectors import TokenVectors


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
    "how", [ScannSettings(None, None, False), ScannSettings(None, None, True), ScannSettings(40, 30, True)]
)
def test_scann_finds_what_the_oracle_finds(how):
    """Brute force, quantised, and tree: re-ranked by exact MaxSim, with exact scores."""
    vectors, q = clustered(1500, 40)
    truth = all_scores(vectors, q)
    rows, scores = scann_index(vectors, CFG.model_copy(update={"rerank": 80}), how).search(q, 5)
    assert recall_of(rows, np.argsort(-truth, axis=1)[:, :5]) > 0.8
    np.testing.assert_allclose(scores, np.take_along_axis(truth, rows, axis=1), rtol=1e-5)
    assert np.all(np.diff(scores, axis=1) <= 0)


def test_scann_short_tree_search_is_padded():
    """One leaf searched of many: fewer hits than asked for come back as -1, never as row 0 repeated."""
    vectors, q = clustered(1500, 10)
    index = scann_index(vectors, CFG.model_copy(update={"rerank": 400}), ScannSettings(60, 1, True))
    rows, scores = index.search(q, 400)
    assert np.any(rows == -1)
    for row, score in zip(rows, scores, strict=True):
        found = row[row >= 0]
        assert len(set(found)) == len(found) and np.all(row[len(found) :] == -1)
        assert np.all(np.isfinite(score[: len(found)])) and np.all(np.isneginf(score[len(found) :]))


def test_more_hits_than_rerank_when_k_asks_for_them():
    vectors, q = clustered(300, 3)
    index = scann_index(vectors, CFG, ScannSettings(None, None, True))
    assert np.all(index.search(q, 250)[0] >= 0)


def test_auto_chooses_by_size():
    vectors, q = clustered(50, 2)
    assert build(vectors, q, "auto", exact_below=51).card.kind == "exact"
    assert build(vectors, q, "auto", exact_below=50).card.kind == "scann"


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_rows_that_are_not_allowed_are_never_returned(kind):
    """Among few allowed ones all are found, however far down ScaNN has them."""
    vectors, q = clustered(300, 6)
    index, truth = build(vectors, q, kind), all_scores(vectors, q)
    for allowed in (np.arange(300) % 2 == 0, np.arange(300) % 50 == 7, np.arange(300) == 12, np.zeros(300, bool)):
        rows, scores = index.search(q, 4, allowed)
        assert allowed[rows[rows >= 0]].all()
        found = min(4, allowed.sum())
        assert (rows >= 0).sum(1).tolist() == [found] * 6 and np.isneginf(scores[:, found:]).all()
        if allowed.sum() <= 6:
            np.testing.assert_array_equal(
                rows[:, :found], np.argsort(-np.where(allowed, truth, -np.inf), axis=1, kind="stable")[:, :found]
            )
    with pytest.raises(ValueError, match=r"bool \[300\]"):
        index.search(q, 3, np.ones(299, bool))


def test_few_allowed_rows_are_found_in_a_tree_too():
    vectors, q = clustered(1500, 10)
    index = scann_index(vectors, CFG, ScannSettings(40, 2, True))
    allowed = np.arange(1500) % 100 == 3
    rows, _ = index.search(q, 15, allowed)
    assert np.array_equal(np.sort(rows, 1), np.tile(np.flatnonzero(allowed), (10, 1)))


@pytest.mark.parametrize("questions", [1, 3, 70])
def test_batches_of_any_size_give_the_same(questions):
    vectors, q = clustered(200, 70)
    index = scann_index(vectors, CFG)
    every, _ = index.search(q, 5)
    np.testing.assert_array_equal(index.search(q[:questions], 5)[0], every[:questions])


@pytest.mark.parametrize("bits, least", [(8, 0.97), (4, 0.85), (2, 0.6)])
def test_coded_tokens_rank_nearly_as_the_exact_ones(bits, least):
    vectors, q = clustered(500, 40)
    index = build(vectors, q, bits=bits, rerank=500)
    truth = np.argsort(-all_scores(vectors, q), axis=1)[:, :10]
    assert recall_of(index.search(q, 10)[0], truth) > least
    assert index.card.bits == bits


def test_centroids_choose_what_is_scored_in_full():
    """Of many hits the best by MaxSim of their centroids are left, and those are ranked by their own vectors."""
    vectors, q = clustered(500, 40)
    searcher = build(vectors, q, bits=8, rerank=400).searcher
    hits, _ = searcher.nearest(q, 400)
    assert searcher.kept(400, 5) == 100 and searcher.kept(400, 80) == 160 and searcher.kept(15, 10) == 15
    store, code = searcher.parts[0].tokens, searcher.code
    found, scores = searcher.search(q, 5)
    for i in range(len(q)):
        ids = [store.arrays["centroid"][store.offsets[row] : store.offsets[row + 1]] for row in hits[i]]
        rough = np.array([(q[i] @ (code.mean_C + code.centroids_GxC[of]).T).max(1).sum() for of in ids])
        by_device = searcher.rough_score(q[i : i + 1], hits[i : i + 1])[0]
        np.testing.assert_allclose(by_device, rough, atol=1e-5)
        left = hits[i][np.lexsort((hits[i], -by_device))[:100]]  # equal ones in row order
        full = searcher.score(q[i : i + 1], left[None])[0]
        assert found[i].tolist() == left[np.argsort(-full)[:5]].tolist()
        np.testing.assert_allclose(scores[i], np.sort(full)[::-1][:5], rtol=1e-5)


@pytest.mark.parametrize("bits", [16, 8])
def test_tuning_takes_the_fewest_hits_that_reach_the_target(bits):
    vectors, q = clustered(500, 60)
    index = build(vectors, q, rerank=400, ann_recall=0.9, bits=bits)
    truth = np.argsort(-all_scores(vectors, q), axis=1)[:, :10]
    curve = index.curve
    assert curve.chosen.ann_recall >= curve.target == 0.9 and curve.k == 10 and curve.questions == 60
    assert list(dict.fromkeys(p.hits for p in curve.points)) == tune.grid(10, 400)
    assert all(p.scored == p.hits for p in curve.points) == (bits == 16)

    def work(p):
        return 12 * p.scored + (p.hits if p.scored < p.hits else 0)

    best = min((p for p in curve.points if p.ann_recall >= 0.9), key=work)
    assert curve.chosen == best and 10 < index.card.hits == best.hits < 400 and index.card.spare == best.spare
    assert recall_of(index.search(q, 10)[0], truth) == pytest.approx(best.ann_recall, abs=1e-3)
    assert index.card.ann_recall["10"] >= 0.9 and index.card.ann_recall_target == 0.9
    assert tune.picture(curve).startswith(b"\x89PNG")


def test_a_target_out_of_reach_is_owned_up_to():
    vectors, q = clustered(500, 40)
    index = build(vectors, q, rerank=12, ann_recall=0.999)
    assert index.curve.chosen.ann_recall < index.curve.target and index.card.hits == 12
    assert index.card.ann_recall["10"] < 0.999


@pytest.mark.exhaustive
def test_a_tree_is_tuned_in_both_directions(monkeypatch):
    monkeypatch.setattr(scann, "settings", lambda passages: ScannSettings(32, 4, True))
    vectors, q = clustered(1500, 30)
    index = build(vectors, q, rerank=100, ann_recall=0.7)
    assert {p.leaves for p in index.curve.points} == {2, 4, 8, 16, 32}
    assert index.card.leaves == index.curve.chosen.leaves == index.searcher.leaves
    assert all(p.scanned == round(1500 * p.leaves / 32) for p in index.curve.points)
    chosen = index.curve.chosen
    assert chosen.ann_recall >= 0.7
    assert chosen == cheapest(index.curve.points, 0.7)


def test_the_least_work_is_chosen():
    def point(hits: int, scored: int, scanned: int, ann_recall: float = 0.95) -> Point:
        return Point(hits=hits, leaves=2, spare=4, scanned=scanned, scored=scored, ann_recall=ann_recall, ms=1.0)

    usual = point(1000, 250, 50_000)
    for other, best in (
        (point(1000, 250, 25_000), True),  # fewer leaves
        (point(900, 250, 50_000), True),  # fewer hits by centroids
        (point(1000, 240, 50_000), True),  # fewer in full
        (point(500, 250, 75_000), True),  # leaves are cheap beside hits
        (point(990, 250, 75_000), False),  # but not free
        (point(600, 300, 50_000), False),  # a hit in full costs as much as several by centroids
        (point(280, 280, 50_000), True),  # all in full: none by centroids
        (point(10, 10, 10, ann_recall=0.9), False),  # not good enough
    ):
        assert (cheapest([usual, other], 0.95) == other) is best
        assert (cheapest([other, usual], 0.95) == other) is best
    fewer, more = point(1000, 2000, 10, ann_recall=0.97), point(2000, 10, 10, ann_recall=0.97)
    assert cheapest([usual, more, fewer], 0.99) == fewer


def test_pieces_make_the_same_index_as_the_whole(monkeypatch):
    """The sample is drawn from the whole corpus, so the code is the same too."""
    vectors, q = clustered(300, 4)
    want = build(vectors, q, bits=4).search(q, 5)
    monkeypatch.setattr(build_module, "BATCH", 37)
    got = build(vectors, q, bits=4).search(q, 5)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    monkeypatch.setattr(build_module, "SAMPLE_PASSAGES", 10)
    rows = sample_rows(300, 0)
    assert len(rows) == 10 and (np.diff(rows) > 0).all() and rows.max() > 150


def in_pieces(vectors, asked, sizes=(7, 1, 12)):
    """Gives any rows in pieces of these numbers in turn, each no wider than it must be; notes what it gave."""

    def encode_rows(rows):
        first, turn = 0, itertools.cycle(sizes)
        while first < len(rows):
            part = rows[first : first + next(turn)]
            asked.append(part)
            first += len(part)
            piece = vectors.rows(part)
            width = int(piece.keep_NxP.sum(1).max())  # tokens that are kept come first
            yield TokenVectors(piece.vectors_NxPxC[:, :width], piece.keep_NxP[:, :width])

    return encode_rows


def streamed(encode_rows, passages, q, **changes):
    return build_index(
        encode_rows,
        passages,
        CFG.model_copy(update=changes),
        model_fingerprint="model-a",
        corpus_fingerprint="corpus-a",
        sample_q_NxQxC=q,
        ann_recall_at=(5,),
    )


@pytest.mark.parametrize("kind, sampled", [("exact", 0), ("scann", 60), ("scann", 300)])
def test_every_passage_is_encoded_once(monkeypatch, kind, sampled):
    """Those that code and encoding are learned from first; the index is that of a corpus in memory."""
    monkeypatch.setattr(build_module, "SAMPLE_PASSAGES", sampled)
    monkeypatch.setattr(build_module, "BATCH", 37)
    vectors, q = clustered(300, 20)
    asked = []
    index = streamed(in_pieces(vectors, asked), 300, q, kind=kind, bits=4)
    order = np.concatenate(asked)
    np.testing.assert_array_equal(np.sort(order), np.arange(300))
    np.testing.assert_array_equal(order[:sampled], sample_rows(300, 0)[:sampled])
    want = build(vectors, q, kind, bits=4)
    np.testing.assert_array_equal(index.search(q, 5)[0], want.search(q, 5)[0])
    np.testing.assert_allclose(index.search(q, 5)[1], want.search(q, 5)[1], rtol=1e-5)


def test_no_more_than_a_block_is_encoded_ahead(monkeypatch):
    monkeypatch.setattr(build_module, "BATCH", 20)
    vectors, _ = clustered(300, 1)
    asked, rows = [], np.arange(3, 300, 9)
    blocks = build_module._blocks(in_pieces(vectors, asked), 300, rows, vectors.rows(rows))
    for number, block in enumerate(blocks, 1):
        wanted = vectors.rows(slice(20 * (number - 1), 20 * number))
        width = block.keep_NxP.shape[1]
        np.testing.assert_array_equal(block.keep_NxP, wanted.keep_NxP[:, :width])
        assert (block.vectors_NxPxC == wanted.vectors_NxPxC[:, :width])[block.keep_NxP].all()
        assert sum(map(len, asked)) < 20 * number + 12, "a piece more than the blocks so far, at most"
    assert number == 15


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_another_number_of_passages_than_asked_for_is_refused(monkeypatch, kind):
    vectors, q = clustered(50, 4)
    with pytest.raises(ValueError, match="empty corpus"):
        streamed(lambda rows: [], 0, q, kind=kind)
    for wrong, said in (
        (slice(0, -2), "only 49 passages came of 50"),
        (slice(0, 51), "more passages came than the 50"),
    ):
        with pytest.raises(ValueError, match=said):
            streamed(lambda rows, wrong=wrong: [vectors.rows(np.append(rows, 0)[wrong])], 50, q, kind=kind)
    if kind == "scann":  # wrong only in what is not of the sample
        monkeypatch.setattr(build_module, "SAMPLE_PASSAGES", 20)
        for more, said in ((-1, "only 29 passages came of 30"), (1, "more passages came than the 30")):
            with pytest.raises(ValueError, match=said):
                streamed(lambda rows, more=more: [vectors.rows(np.arange(len(rows) + more * (len(rows) == 30)))], 50, q)


def test_a_wrong_count_of_passages_is_refused():
    vectors, _ = clustered(20, 1)
    with pytest.raises(ValueError, match="more passages came than the 19"):
        ScannIndex.build([vectors], vectors, 19, CFG, 0)
    with pytest.raises(ValueError, match="only 20 passages came for an index of 21"):
        ScannIndex.build([vectors], vectors, 21, CFG, 0)


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


@pytest.mark.parametrize("cosine", [0.0, 0.95])
def test_what_all_tokens_have_in_common_does_not_hide_what_tells_them_apart(cosine):
    """Vectors of modern encoders: the same hits find as much, and the target is reached, whatever their mean cosine."""
    vectors, q = with_common_part(*clustered(1000, 40), cosine)
    tokens = vectors.vectors_NxPxC[vectors.keep_NxP].astype(np.float32)
    assert np.sum(tokens.mean(0) ** 2) == pytest.approx(cosine, abs=0.05)
    truth = np.argsort(-all_scores(vectors, q), axis=1)[:, :10]
    index = build(vectors, q, bits=4, rerank=400, ann_recall=0.85)
    hits, _ = index.searcher.nearest(q, 100)
    assert recall_of(hits, truth) > 0.85
    assert index.card.ann_recall["10"] >= 0.85 and index.card.hits < 200


def with_common_part(vectors, q, cosine):
    """All tokens moved along one direction and normalised again, until the mean cosine of two of them is this."""
    by = np.sqrt(cosine / (1 - cosine)) * np.eye(vectors.vectors_NxPxC.shape[-1])[3]
    p, q = (x + by for x in (vectors.vectors_NxPxC.astype(np.float32), q))
    p, q = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (p, q))
    return TokenVectors(p.astype(np.float16), vectors.keep_NxP), q.astype(np.float32)
