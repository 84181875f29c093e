"""Small corpora of clustered token vectors, and indexes over them."""

from __future__ import annotations

import numpy as np

from jmlr_jax.config import IndexConfig
from jmlr_jax.retrieval.build import build_index
from jmlr_jax.retrieval.scann import ScannIndex
from jmlr_jax.retrieval.store import passage_digests
from jmlr_jax.retrieval.vectors import TokenVectors

DIM, TOKENS, QUERY_TOKENS = 16, 8, 5
CFG = IndexConfig(
    kind="scann",
    rerank=40,
    ann_recall=None,
    bits=16,
    fde_partitions=30,
    pca_components=100,
)


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


def digests_of(vectors):
    """A stand-in for digests of token ids."""
    return passage_digests(np.ascontiguousarray(row).view(np.int16) for row in vectors.vectors_NxPxC)


def scann_index(vectors, cfg, how=None):
    return ScannIndex.build([vectors], vectors, len(vectors), cfg, 0, how)


def build(vectors, q, kind="scann", digests=None, **changes):
    return build_index(
        lambda rows: (vectors.rows(part) for part in np.array_split(rows, 3) if len(part)),
        len(vectors),
        CFG.model_copy(update={"kind": kind, **changes}),
        digests_Nx16=digests,
        model_fingerprint="model-a",
        corpus_fingerprint="corpus-a",
        sample_q_NxQxC=q,
        ann_recall_at=(1, 10),
    )
