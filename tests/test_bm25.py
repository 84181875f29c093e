"""BM25 against the formula written out, and its edges."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from jmlr_jax.retrieval.bm25 import BM25, best_rows

TEXTS = [
    "Renal artery stenosis narrows the artery of the kidney.",
    "Asthma narrows airways; inhaled steroids help.",
    "Kidneys filter blood. Kidney failure needs dialysis.",
    "The and of a.",
    "Asthma narrows airways; inhaled steroids help.",
]


def test_scores_are_the_formula():
    """Lucene BM25 by hand for 'kidney' (stem of kidney and kidneys), k1 1.5, b 0.75."""
    lengths = [6, 6, 7, 0, 6]  # renal arteri stenosi narrow arteri kidney | asthma ... | kidney filter blood kidney ...
    counts = {0: 1, 2: 2}
    idf = math.log(1 + (5 - 2 + 0.5) / (2 + 0.5))
    want = {
        row: idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * lengths[row] / np.mean(lengths))) for row, tf in counts.items()
    }
    rows, scores = BM25(TEXTS).search(["Kidneys?"], 5)
    assert rows.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, [[2, 0, -1, -1, -1]])
    np.testing.assert_allclose(scores[0, :2], [want[2], want[0]], rtol=1e-5)
    assert np.all(np.isneginf(scores[0, 2:]))


def test_k_above_the_corpus_and_unknown_words():
    """Fault 14: short lists are padded, never shifted."""
    rows, scores = BM25(TEXTS).search(["zebra", "asthma", "", "the of"], 9)
    assert rows.shape == scores.shape == (4, 9)
    np.testing.assert_array_equal(rows[1], [1, 4] + [-1] * 7)
    assert np.all(rows[[0, 2, 3]] == -1)


def test_equal_scores_keep_corpus_order_at_the_cut():
    texts = ["fever cough"] * 50
    rows, _ = BM25(texts).search(["fever"], 7)
    np.testing.assert_array_equal(rows, [range(7)])
    np.testing.assert_array_equal(best_rows(np.array([1.0, 2.0, 1.0, 1.0]), 2), [1, 0])


def test_same_rows_under_any_hash_seed():
    """String hashing differs between processes; rows and scores must not."""
    code = (
        "from jmlr_jax.retrieval.bm25 import BM25\n"
        f"rows, scores = BM25({TEXTS!r}).search(['artery narrows kidney asthma steroids'], 5)\n"
        "print(rows.tobytes().hex(), scores.tobytes().hex())"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(out) == 1


def test_edges():
    with pytest.raises(ValueError, match="empty"):
        BM25([])
    with pytest.raises(ValueError, match="k=0"):
        BM25(TEXTS).search(["fever"], 0)
    rows, _ = BM25(["the", "of"]).search(["the fever"], 2)
    assert np.all(rows == -1)
    assert BM25(TEXTS).search([], 3)[0].shape == (0, 3)


def test_text_without_spaces_is_found_by_pairs_of_characters():
    texts = ["糖尿病患者应使用胰岛素治疗。", "高血压患者应当限制钠盐摄入。", "Insulin helps."]
    rows, scores = BM25(texts).search(["胰岛素怎么用", "限制钠盐", "insulin 糖尿病"], 3)
    assert rows[0].tolist() == [0, -1, -1] and rows[1].tolist() == [1, -1, -1]
    assert set(rows[2].tolist()) == {0, 2, -1} and np.isfinite(scores[0, 0])
