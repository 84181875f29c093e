"""The token code: what it keeps, what it costs, and that scoring coded tokens is scoring decoded ones."""

import itertools

import jax
import numpy as np
import pytest

from jmlr_jax.retrieval import code as module
from jmlr_jax.retrieval.code import TokenCode, asked, bit_widths, encode_tokens, fit_code, similarity
from jmlr_jax.retrieval.tokens import TILE, TokenStore, best_of, gather, padded, score_tokens, trimmed
from jmlr_jax.retrieval.vectors import TokenVectors

DIM = 16


def unit_tokens(n, seed=0):
    """Unit vectors around 20 topics, with most of their spread along a few axes."""
    rng = np.random.default_rng(seed)
    topics = np.random.default_rng(99).normal(size=(20, DIM))
    spread = np.diag(np.geomspace(1.5, 0.01, DIM))
    x = topics[rng.integers(0, 20, n)] + rng.normal(size=(n, DIM)) @ spread
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def decoded(code: TokenCode, ids, residuals, gain):
    """The stated formula in plain numpy, bit by bit."""
    level = np.zeros((len(ids), DIM))
    at = start = 0
    for bits, count in code.widths:
        planes = {3: (2, 1)}.get(bits, (bits,)) if bits else ()  # three bits: the lower two of all, the upper of all
        lower = 0
        for plane in planes:
            per = 8 // plane
            for entry in range(count):
                byte, place = entry % (count // per), entry // (count // per)
                value = (residuals[:, at + byte].astype(int) >> (plane * place)) & (2**plane - 1)
                level[:, start + entry] += value * 2**lower
            at, lower = at + plane * count // 8, lower + plane
        level[:, start : start + count] -= (2**bits - 1) / 2 if bits else 0
        start += count
    residual = (level * code.step_C) @ code.rotate_CxC.T
    return code.mean_C + (0.8 + gain[:, None] / 400) * (code.centroids_GxC[ids] + code.scale_G[ids, None] * residual)


@pytest.fixture(scope="module")
def tokens():
    return unit_tokens(3000)


def coded(code, x):
    return tuple(np.asarray(a) for a in encode_tokens(code, x))


@pytest.mark.parametrize("bits, bound", [(1, 0.25), (2, 0.12), (3, 0.05), (4, 0.02), (8, 0.001)])
def test_more_bits_less_error(tokens, bits, bound):
    code = fit_code(tokens, bits, len(tokens), seed=0)
    ids, residuals, gain = coded(code, tokens)
    assert residuals.shape == (3000, bits * DIM // 8) and residuals.dtype == np.uint8 and ids.dtype == np.uint16
    error = np.mean(np.sum((decoded(code, ids, residuals, gain) - tokens) ** 2, axis=1))
    assert error < bound
    # The gain undoes the shortening of what is coded.
    lengths = [np.linalg.norm(x - code.mean_C, axis=1) for x in (decoded(code, ids, residuals, gain), tokens)]
    np.testing.assert_allclose(*lengths, rtol=0.002)


@pytest.mark.parametrize("widths", [((2, 16),), ((3, 16),), ((4, 8), (3, 8)), ((8, 8), (1, 8)), ((3, 8), (0, 8))])
def test_scores_of_coded_tokens_are_those_of_the_decoded(tokens, widths, monkeypatch):
    monkeypatch.setattr(module, "bit_widths", lambda variance, budget: widths)
    code = fit_code(tokens, 2, len(tokens), seed=0)
    ids, residuals, gain = coded(code, tokens[:50])
    q = unit_tokens(5, seed=7)
    found = similarity(code, asked(code, q), {"centroid": ids, "residual": residuals, "gain": gain})
    np.testing.assert_allclose(found, decoded(code, ids, residuals, gain) @ q.T, atol=1e-5)


def test_bits_go_where_the_spread_is(tokens):
    code = fit_code(tokens, 2, len(tokens), seed=0)
    assert code.widths[0][0] > 2 > code.widths[-1][0]
    assert sum(count for _, count in code.widths) == DIM and code.residual_bytes == 2 * DIM // 8
    flat = bit_widths(np.ones(16), 32)
    assert flat == ((2, 16),) and bit_widths(np.ones(16), 48) == ((3, 16),)
    np.testing.assert_allclose(code.rotate_CxC @ code.rotate_CxC.T, np.eye(DIM), atol=1e-5)
    again = fit_code(tokens, 2, len(tokens), seed=0)
    np.testing.assert_array_equal(again.centroids_GxC, code.centroids_GxC)


def test_widths_that_cannot_be_packed_are_refused(tokens):
    with pytest.raises(ValueError, match="multiple of 8.*index.bits=16"):
        fit_code(tokens[:, :12], 2, 3000, seed=0)


def store_of(tokens, code, lengths):
    """Two pieces of passages with holes in their masks."""
    rng, pieces, at, width = np.random.default_rng(0), [], 0, max(lengths) + 2
    for some in np.array_split(lengths, 2):
        vectors = np.zeros((len(some), width, DIM), np.float16)
        keep = np.zeros((len(some), width), bool)
        for row, length in enumerate(some):
            keep[row, np.sort(rng.choice(width, length, replace=False))] = True
            vectors[row, keep[row]] = tokens[at : at + length]
            at += length
        pieces.append(TokenVectors(vectors, keep))
    return TokenStore.of(pieces, code)


@pytest.mark.parametrize("bits", [2, 16])
def test_store_scores_like_numpy_and_survives_the_disk(tokens, bits, tmp_path):
    code = None if bits == 16 else fit_code(tokens, bits, 3000, seed=0)
    lengths = np.array([3, TILE, 1, 2 * TILE + 5, 7])
    made = store_of(tokens, code, lengths)
    made.save(tmp_path)
    store = TokenStore.load(tmp_path, code)
    assert all(isinstance(array, np.memmap) for array in store.arrays.values())
    rows = np.array([[4, 0, 2, -1], [1, 1, 3, 8]])  # 8: the fourth of another part
    q = np.stack([unit_tokens(8, seed=1), unit_tokens(8, seed=2)])
    q[1, 5:] = 0  # absent
    other = store_of(tokens[500:], code, lengths[::-1])
    x = tokens.astype(np.float16)  # what a store is given
    x = x if code is None else decoded(code, *coded(code, x))
    of = [x[a:b] for a, b in itertools.pairwise(np.cumsum([0, *lengths]))]
    of += [x[500 + a : 500 + b] for a, b in itertools.pairwise(np.cumsum([0, *lengths[::-1]]))]
    for i, of_question in enumerate(rows):
        found = score_tokens(code, q[i], gather([store, other], store.arrays, of_question), hits=4)
        for j, row in enumerate(of_question):
            want = (q[i] @ of[row].astype(np.float64).T).max(1).sum()
            assert found[j] == pytest.approx(want, abs=2e-3) if row >= 0 else found[j] < -1e3
    tiles = gather([store, other], store.arrays, rows[0])
    alone = score_tokens(code, q[0], gather([store], store.arrays, rows[0]), hits=4)
    np.testing.assert_allclose(alone, score_tokens(code, q[0], tiles, hits=4), rtol=1e-5)
    if code is not None:
        rough = score_tokens(code, q[0], gather([store, other], ["centroid"], rows[0]), hits=4)
        cells = code.mean_C + code.centroids_GxC[store.arrays["centroid"][: lengths[0]]]
        assert rough[1] == pytest.approx((q[0] @ cells.T).max(1).sum(), abs=1e-4)


def test_arrays_of_another_store_are_refused(tokens, tmp_path):
    store_of(tokens, None, np.array([3, 4])).save(tmp_path)
    np.save(tmp_path / "vectors.npy", np.zeros((5, DIM), np.float16))
    with pytest.raises(ValueError, match="5 tokens.*speaks of 7"):
        TokenStore.load(tmp_path, None)


def test_question_shapes_are_few():
    q = np.zeros((3, 32, DIM), np.float32)
    q[1, 9] = 1
    assert trimmed(q).shape == (3, 16, DIM) and trimmed(q[:1]).shape[1] == 8
    assert padded(q).shape[0] == 8 and padded(q[:1]).shape[0] == 1
    rows, scores = best_of(np.array([[4, -1, 2]]), np.array([[0.5, 9.0, 0.5]]), 4)
    assert rows.tolist() == [[2, 4, -1, -1]] and np.isneginf(scores[0, 2:]).all()


def test_code_is_a_tree():
    """It crosses into compiled functions; its widths are part of their shape."""
    code = fit_code(unit_tokens(200), 1, 200, seed=0)
    leaves, form = jax.tree.flatten(code)
    assert len(leaves) == 5 and jax.tree.unflatten(form, leaves).widths == code.widths
