"""Batched encoding with a stand-in encoder: same vectors as row by row, one compilation, several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.nn import functional
from jmlr_jax.parallel.sharding import make_mesh
from jmlr_jax.retrieval import encode
from jmlr_jax.retrieval.vectors import TokenVectors

CFG = RetrieverConfig(dim=8)
VOCAB, PASSAGES, LENGTH = 30, 11, 6
ALL = np.arange(PASSAGES)


def read_from(ids, length):
    return lambda rows: (ids[rows], length[rows])


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (PASSAGES, LENGTH)).astype(np.int32)
    length = rng.integers(2, LENGTH + 1, PASSAGES).astype(np.int32)
    params = {"table": jnp.asarray(rng.normal(size=(VOCAB, CFG.dim)), jnp.float32)}
    skip = np.arange(VOCAB) < 4
    return params, ids, length, skip


def counted(calls):
    """Encoders that note how often they are traced."""

    def passages(params, cfg, ids, length, skip):
        calls.append(ids.shape)
        p = params["table"][ids]
        keep = (jnp.arange(ids.shape[1]) < length[:, None]) & ~skip[ids]
        return p / jnp.linalg.norm(p, axis=-1, keepdims=True), keep

    def queries(params, cfg, ids, length):
        return passages(params, cfg, ids, length, jnp.zeros(VOCAB, bool))[0]

    return passages, queries


def everything(*args, **kwargs):
    """All pieces as one."""
    pieces = list(encode.encode_passages_batched(*args, **kwargs))
    arrays = zip(*((piece.vectors_NxPxC, piece.keep_NxP) for piece in pieces), strict=True)
    return TokenVectors(*map(np.concatenate, arrays))


def by_hand(params, ids, length, skip):
    table = np.asarray(params["table"])
    table = table / np.linalg.norm(table, axis=-1, keepdims=True)
    keep = np.array([[t < n and not skip[i] for t, i in enumerate(row)] for row, n in zip(ids, length, strict=True)])
    return table[ids], keep


@pytest.mark.parametrize("batch", [4, 11, 64])
def test_corpus_equals_row_by_row(corpus, batch):
    """Batches that do not divide the corpus, that equal it, and that exceed it."""
    params, ids, length, skip = corpus
    want, keep = by_hand(params, ids, length, skip)
    got = everything(counted([])[0], params, CFG, read_from(ids, length), ALL, skip, batch=batch)
    assert got.vectors_NxPxC.dtype == np.float16
    np.testing.assert_allclose(got.vectors_NxPxC, want, atol=1e-3)
    np.testing.assert_array_equal(got.keep_NxP, keep)


def test_any_rows_come_in_the_order_asked_for(corpus):
    params, ids, length, skip = corpus
    want, keep = by_hand(params, ids, length, skip)
    rows, read = np.array([7, 2, 9, 0, 10]), read_from(ids, length)
    pieces = list(encode.encode_passages_batched(counted([])[0], params, CFG, read, rows, skip, batch=2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    np.testing.assert_allclose(np.concatenate([p.vectors_NxPxC for p in pieces]), want[rows], atol=1e-3)
    np.testing.assert_array_equal(np.concatenate([p.keep_NxP for p in pieces]), keep[rows])
    assert list(encode.encode_passages_batched(counted([])[0], params, CFG, read, rows[:0], skip, batch=2)) == []


def test_of_many_those_of_like_length_are_encoded_together(corpus, monkeypatch):
    """In few widths, each compiled once, as narrow as they need; what comes out is the same, in the order asked for."""
    params, ids, length, skip = corpus
    ids = np.pad(ids, ((0, 0), (0, 40 - LENGTH)))
    length = np.where(np.arange(PASSAGES) % 3 == 1, 33, length)
    want, keep = by_hand(params, ids, length, skip)
    monkeypatch.setattr(encode, "MANY", 3)
    calls, rows = [], np.random.default_rng(1).permutation(PASSAGES)
    args = counted(calls)[0], params, CFG, read_from(ids, length), rows, skip
    pieces = list(encode.encode_passages_batched(*args, batch=2))
    assert [len(piece) for piece in pieces] == [2] * (PASSAGES // 2) + [1] * (PASSAGES % 2)
    np.testing.assert_array_equal(np.concatenate([p.keep_NxP for p in pieces]), keep[rows])
    got = np.concatenate([p.vectors_NxPxC for p in pieces])
    np.testing.assert_allclose(got[keep[rows]], want[rows][keep[rows]], atol=1e-3)
    assert sorted(calls) == [(2, 8), (2, 40)]


def test_compiles_once_over_refreshes(corpus):
    params, ids, length, skip = corpus
    calls = []
    passages, queries = counted(calls)
    read = read_from(ids, length)
    for scale in (1.0, 2.0):
        fresh = jax.tree.map(lambda x, scale=scale: x * scale, params)
        everything(passages, fresh, CFG, read, ALL, skip, batch=4)
    assert calls == [(4, LENGTH)]
    for _ in range(2):
        list(encode.encode_queries_batched(queries, params, CFG, read, PASSAGES, batch=4))
    assert len(calls) == 2


def test_queries_come_in_order(corpus):
    params, ids, length, _ = corpus
    pieces = list(encode.encode_queries_batched(counted([])[1], params, CFG, read_from(ids, length), PASSAGES, batch=4))
    assert [len(p) for p in pieces] == [4, 4, 3]
    want, _ = by_hand(params, ids, length, np.zeros(VOCAB, bool))
    np.testing.assert_allclose(np.concatenate(pieces), want, atol=1e-6)
    assert list(encode.encode_queries_batched(counted([])[1], params, CFG, read_from(ids, length), 0, batch=4)) == []


def test_mesh_gives_the_same_vectors(corpus):
    """All devices there are; the batch is rounded up to them."""
    params, ids, length, skip = corpus
    mesh = make_mesh(MeshConfig())
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    calls = []
    got = everything(counted(calls)[0], params, CFG, read_from(ids, length), ALL, skip, batch=3, mesh=mesh)
    want, keep = by_hand(params, ids, length, skip)
    np.testing.assert_allclose(got.vectors_NxPxC, want, atol=1e-3)
    np.testing.assert_array_equal(got.keep_NxP, keep)
    assert calls == [(-(-3 // mesh.size) * mesh.size, LENGTH)]


def test_the_real_encoder_fits():
    """The seam's functions are taken as they are."""
    cfg = CFG.model_copy(
        update={
            "bert": CFG.bert.model_copy(
                update={"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8, "max_positions": LENGTH}
            )
        }
    )
    params = functional.init_colbert(cfg, jax.random.key(0))
    ids = np.random.default_rng(1).integers(0, VOCAB, (5, LENGTH)).astype(np.int32)
    length = np.array([6, 5, 4, 3, 2], np.int32)
    skip = np.arange(VOCAB) < 2
    run = partial(everything, functional.encode_passages, params, cfg, read_from(ids, length), np.arange(5), skip)
    one, other = run(batch=2), run(batch=5)
    np.testing.assert_allclose(one.vectors_NxPxC, other.vectors_NxPxC, atol=2e-3)
    norms = np.linalg.norm(one.vectors_NxPxC.astype(np.float32), axis=-1)
    np.testing.assert_allclose(norms[one.keep_NxP], 1, atol=2e-3)
