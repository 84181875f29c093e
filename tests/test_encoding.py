"""Single vectors reduced to their principal components: what is kept, what is not, and that nothing is invented."""

import numpy as np
from indexes import CFG, DIM, clustered

from jmlr_jax.retrieval.encoding import passage_vectors, plain_encoding, query_vectors, reduced
from jmlr_jax.retrieval.fde import fit_fde, passage_fde, query_fde
from jmlr_jax.retrieval.vectors import TokenVectors


def plain_over(vectors, partitions=CFG.fde_partitions):
    """Learned from all of these passages."""
    return plain_encoding(fit_fde(vectors.vectors_NxPxC[vectors.keep_NxP], partitions, 0))


def products(encoding, vectors, q):
    return np.asarray(query_vectors(encoding, q)) @ passage_vectors(encoding, vectors).T


def centred(x):
    return x - x.mean(1, keepdims=True)


def test_without_reduction_these_are_the_encodings():
    vectors, q = clustered(40, 3)
    plain = plain_over(vectors)
    assert plain.width == plain.fde.width == 30 * DIM
    np.testing.assert_array_equal(query_vectors(plain, q), query_fde(plain.fde, q))
    want = passage_fde(plain.fde, vectors.vectors_NxPxC, vectors.keep_NxP)
    np.testing.assert_allclose(passage_vectors(plain, vectors), want, atol=1e-6)
    np.testing.assert_allclose(passage_vectors(plain, vectors, 16), want, atol=1e-6)


def test_a_sample_that_spans_the_corpus_keeps_every_difference():
    """Products change by the same amount for all passages of a question, so the order stays."""
    vectors, q = clustered(40, 5)
    plain = plain_over(vectors)
    whole = reduced(plain, passage_vectors(plain, vectors), 200)
    assert whole.width == 39  # 40 points span 39 dimensions
    want, got = products(plain, vectors, q), products(whole, vectors, q)
    np.testing.assert_allclose(centred(got), centred(want), atol=2e-3 * np.abs(want).max())
    np.testing.assert_allclose(whole.basis_FxD.T @ whole.basis_FxD, np.eye(39), atol=5e-3)


def test_few_components_keep_more_than_few_partitions():
    vectors, q = clustered(600, 20)
    plain = plain_over(vectors)
    want = centred(products(plain, vectors, q)).ravel()
    narrow = reduced(plain, passage_vectors(plain, vectors.rows(slice(0, 300))), 32)
    coarse = plain_over(vectors, partitions=2)  # as many numbers
    kept, lost = (
        np.corrcoef(centred(products(encoding, vectors, q)).ravel(), want)[0, 1] for encoding in (narrow, coarse)
    )
    assert narrow.width == coarse.width == 32 and kept > 0.9 > lost


def test_corpora_with_nothing_to_tell_apart():
    vectors, q = clustered(1, 2)
    same = TokenVectors(np.repeat(vectors.vectors_NxPxC, 9, axis=0), np.repeat(vectors.keep_NxP, 9, axis=0))
    plain = plain_over(vectors)
    for corpus in (vectors, same):
        encoding = reduced(plain, passage_vectors(plain, corpus), 4)
        assert np.isfinite(products(encoding, corpus, q)).all()
