"""Fixed-dimensional encodings against the definition written out in numpy, and against MaxSim."""

import numpy as np
import pytest

from jmlr_jax.method.scoring import maxsim
from jmlr_jax.retrieval.fde import fit_fde, passage_fde, query_fde

DIM = 6


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def fitted(rng, seed=1):
    """Learned from tokens with a mean."""
    return fit_fde(unit(rng, 200, DIM) + 0.3, 5, seed)


def reference(fde, tokens, passage):
    """One bag of tokens through the definition, partition by partition."""
    out = []
    for number, centroid in enumerate(fde.centroids_SxC):
        value = np.zeros(DIM)
        if not passage:
            distance = [((fde.centroids_SxC - (x - fde.mean_C)) ** 2).sum(1) for x in tokens]
            value = sum((x for x, d in zip(tokens, distance, strict=True) if np.argmin(d) == number), value)
        elif len(tokens):
            value = max((x - fde.mean_C for x in tokens), key=lambda x: float(x @ centroid))
        out.extend(value)
    return np.array(out)


def test_encodings_are_the_definition():
    rng = np.random.default_rng(0)
    fde, q, p, keep = fitted(rng), unit(rng, 3, 5, DIM), unit(rng, 40, 7, DIM), rng.random((40, 7)) < 0.5
    keep[0], keep[1] = False, True
    got_q, got_p = query_fde(fde, q), passage_fde(fde, p, keep)
    assert got_q.shape == (3, fde.width) == (3, 5 * DIM) and got_q.dtype == got_p.dtype == np.float32
    np.testing.assert_allclose(got_q, [reference(fde, x, False) for x in q], atol=1e-5)
    want = [reference(fde, x[k], True) for x, k in zip(p, keep, strict=True)]
    np.testing.assert_allclose(got_p, want, atol=1e-5)
    np.testing.assert_array_equal(got_p[0], 0)


def test_masked_tokens_leave_no_trace():
    rng = np.random.default_rng(2)
    fde, p, keep = fitted(rng), unit(rng, 2, 7, DIM), np.array([[True] * 4 + [False] * 3] * 2)
    other = p.copy()
    other[:, 4:] = 2 * unit(rng, 2, 3, DIM)
    np.testing.assert_array_equal(passage_fde(fde, p, keep), passage_fde(fde, other, keep))


def test_absent_query_tokens_add_nothing():
    rng = np.random.default_rng(3)
    fde, q = fitted(rng), unit(rng, 2, 5, DIM)
    longer = np.concatenate([q, np.zeros((2, 3, DIM), np.float32)], axis=1)
    np.testing.assert_allclose(query_fde(fde, longer), query_fde(fde, q), atol=1e-6)


def test_no_more_partitions_than_tokens():
    tokens = unit(np.random.default_rng(4), 3, DIM)
    fde = fit_fde(tokens.astype(np.float16), 5, 0)
    assert fde.centroids_SxC.shape == (3, DIM) and fde.centroids_SxC.dtype == fde.mean_C.dtype == np.float32
    np.testing.assert_allclose(fde.mean_C, tokens.mean(0), atol=1e-3)


def test_same_seed_same_partitions():
    one, two, three = (fitted(np.random.default_rng(0), seed=s).centroids_SxC for s in (4, 4, 5))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)


@pytest.mark.parametrize("common", [0.0, 4.0])
def test_inner_product_estimates_maxsim(common):
    """Questions copy noisy tokens of their passage: estimates follow MaxSim and the passage comes first.

    So they do where all vectors are turned towards one: their mean cosine is then 0.94.
    """
    rng = np.random.default_rng(7)
    n, dim = 64, 32
    p, keep = unit(rng, n, 12, dim), np.ones((n, 12), bool)
    q = p[:, :6] + 0.1 * rng.normal(size=(n, 6, dim)).astype(np.float32)
    towards = common * unit(rng, dim)
    q, p = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q + towards, p + towards))
    truth = np.asarray(maxsim(q, np.broadcast_to(p, (n, *p.shape)), np.broadcast_to(keep, (n, *keep.shape))))
    order = truth - truth.mean(1, keepdims=True)
    traces = []
    for partitions, least in ((32, 0.7), (128, 0.8)):
        fde = fit_fde(p.reshape(-1, dim), partitions, seed=0)
        constant = (q @ fde.mean_C).sum(1)  # what is left out, the same for all passages of a question
        got = np.asarray(query_fde(fde, q)) @ np.asarray(passage_fde(fde, p, keep)).T + constant[:, None]
        assert np.corrcoef((got - got.mean(1, keepdims=True)).ravel(), order.ravel())[0, 1] > least
        assert np.mean(np.argmax(got, axis=1) == np.arange(n)) > 0.95
        assert (got <= truth + 1e-4).all(), "no token answers better than the best one"
        traces.append(np.trace(got))
    assert traces[0] < traces[1] < np.trace(truth), "nearer with finer partitions"
