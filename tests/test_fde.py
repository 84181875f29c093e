"""Fixed-dimensional encodings against the definition written out in numpy, and against MaxSim."""

import numpy as np
import pytest

from jmlr_jax.config import IndexConfig
from jmlr_jax.method.scoring import maxsim
from jmlr_jax.retrieval import fde

SMALL = IndexConfig(fde_repetitions=3, fde_simhash_bits=3, fde_projection=4, fde_final=50)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def simhash(x, directions):
    return tuple(int(x @ directions[:, h] > 0) for h in range(directions.shape[1]))


def reference(params, tokens, passage):
    """One bag of tokens through MUVERA's definition, partition by partition."""
    out = []
    for directions, project in zip(params.hash_RxCxH, params.project_RxCxW, strict=True):
        codes = [simhash(x, directions) for x in tokens]
        for s in range(2 ** directions.shape[1]):
            code = tuple((s >> h) & 1 for h in range(directions.shape[1]))
            inside = [x for x, c in zip(tokens, codes, strict=True) if c == code]
            if not passage:
                block = np.sum(inside, axis=0) if inside else np.zeros(len(directions))
            elif inside:
                block = np.mean(inside, axis=0)
            elif len(tokens):
                distance = [sum(a != b for a, b in zip(c, code, strict=True)) for c in codes]
                block = tokens[distance.index(min(distance))]
            else:
                block = np.zeros(len(directions))
            out.extend(project.T @ block)
    folded = np.zeros(params.order_GxF.shape[1])
    for order, sign in zip(params.order_GxF, params.sign_GxF, strict=True):
        for f, (entry, s) in enumerate(zip(order, sign, strict=True)):
            folded[f] += s * out[entry] if entry < len(out) else 0
    return folded if passage else folded / len(params.hash_RxCxH)


@pytest.mark.parametrize("final", [50, 96, 5000])
def test_encodings_are_the_definition(final):
    """Folded with padding, folded to the exact width, and not folded at all."""
    rng = np.random.default_rng(0)
    params = fde.init_fde(SMALL.model_copy(update={"fde_final": final}), 6, seed=1)
    q, p, keep = unit(rng, 3, 5, 6), unit(rng, 4, 7, 6), rng.random((4, 7)) < 0.5
    keep[0], keep[1] = False, True
    got_q, got_p = fde.query_fde(params, q), fde.passage_fde(params, p, keep)
    assert got_q.shape == (3, min(final, 96)) and got_q.dtype == np.float32
    np.testing.assert_allclose(got_q, [reference(params, x, False) for x in q], atol=1e-5)
    want = [reference(params, x[k], True) for x, k in zip(p, keep, strict=True)]
    np.testing.assert_allclose(got_p, want, atol=1e-5)
    np.testing.assert_array_equal(got_p[0], 0)


def test_masked_tokens_leave_no_trace():
    rng = np.random.default_rng(2)
    params = fde.init_fde(SMALL, 6, seed=1)
    p, keep = unit(rng, 2, 7, 6), np.array([[True] * 4 + [False] * 3] * 2)
    other = p.copy()
    other[:, 4:] = unit(rng, 2, 3, 6)
    np.testing.assert_array_equal(fde.passage_fde(params, p, keep), fde.passage_fde(params, other, keep))


def test_zero_query_tokens_add_nothing():
    rng = np.random.default_rng(3)
    params = fde.init_fde(SMALL, 6, seed=1)
    q = unit(rng, 2, 5, 6)
    longer = np.concatenate([q, np.zeros((2, 3, 6), np.float32)], axis=1)
    np.testing.assert_allclose(fde.query_fde(params, longer), fde.query_fde(params, q), atol=1e-6)


def test_final_projection_uses_every_entry_once():
    params = fde.init_fde(SMALL, 6, seed=1)
    entries = 3 * 8 * 4
    used = params.order_GxF[params.order_GxF < entries]
    np.testing.assert_array_equal(np.sort(used), np.arange(entries))
    assert set(np.unique(params.sign_GxF)) == {-1.0, 1.0}


def test_same_seed_same_draws():
    one, two, three = (fde.init_fde(SMALL, 6, seed=s) for s in (4, 4, 5))
    for a, b, c in zip(one, two, three, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_inner_product_estimates_maxsim():
    """Questions copy noisy tokens of their passage: estimates follow MaxSim and the passage comes first."""
    rng = np.random.default_rng(7)
    n, dim = 64, 32
    p, keep = unit(rng, n, 12, dim), np.ones((n, 12), bool)
    q = p[:, :6] + 0.1 * rng.normal(size=(n, 6, dim)).astype(np.float32)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    truth = np.asarray(maxsim(q, np.broadcast_to(p, (n, *p.shape)), np.broadcast_to(keep, (n, *keep.shape))))

    def estimate(**changes):
        params = fde.init_fde(
            IndexConfig(fde_repetitions=20, fde_simhash_bits=4).model_copy(update=changes), dim, seed=0
        )
        return np.asarray(fde.query_fde(params, q)) @ np.asarray(fde.passage_fde(params, p, keep)).T

    folded, full = estimate(), estimate(fde_projection=dim, fde_final=10**6)
    finer = estimate(fde_projection=dim, fde_final=10**6, fde_simhash_bits=6)
    for got, least in ((folded, 0.7), (full, 0.85)):
        assert np.corrcoef(got.ravel(), truth.ravel())[0, 1] > least
        assert np.mean(np.argmax(got, axis=1) == np.arange(n)) > 0.95
    # The estimate is on MaxSim's own scale: below it, a mean being no maximum, and nearer with finer partitions.
    assert 0.35 < np.trace(full) / np.trace(truth) < np.trace(finer) / np.trace(truth) < 1.0
    np.testing.assert_allclose(np.trace(folded), np.trace(full), rtol=0.1)
