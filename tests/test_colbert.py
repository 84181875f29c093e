"""The late-interaction encoder: unit vectors, masks, query augmentation."""

from __future__ import annotations

import hf_map
import jax
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax.config_models import BertConfig, RetrieverConfig
from jmlr_jax.nn import functional as F

encode_queries = jax.jit(F.encode_queries, static_argnums=1)
encode_passages = jax.jit(F.encode_passages, static_argnums=1)

V, W, MASK, COMMA = 40, 9, 4, 7
LENGTHS = np.array([9, 5, 2])
REAL = np.arange(W) < LENGTHS[:, None]
SKIP = np.arange(V) == COMMA


def config(**changes: bool) -> RetrieverConfig:
    return RetrieverConfig(bert=BertConfig(vocab_size=V, num_layers=2), dim=12, **changes)


def ids(filling: int) -> np.ndarray:
    real = np.random.default_rng(0).integers(10, V, (3, W))
    real[0, 3] = real[1, 2] = COMMA
    return np.where(REAL, real, filling)


@pytest.fixture(scope="module")
def params() -> dict:
    return F.init_colbert(config(), jax.random.key(0))


def test_equal_to_the_published_computation() -> None:
    """BertModel, linear map without bias, normalise; the mask tokens are not attended to and count."""
    hf = transformers.BertConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    model, linear = transformers.BertModel(hf).eval(), torch.nn.Linear(24, 12, bias=False)
    bert = hf_map.bert_config(hf)
    cfg = RetrieverConfig(bert=bert, dim=12)
    params = {"bert": hf_map.bert_params(model, bert), "projection": linear.weight.detach().numpy().T}
    with torch.no_grad():
        hidden = model(torch.tensor(ids(MASK)), attention_mask=torch.tensor(REAL)).last_hidden_state
        theirs = torch.nn.functional.normalize(linear(hidden), dim=-1).numpy()
    np.testing.assert_allclose(encode_queries(params, cfg, ids(MASK), LENGTHS), theirs, atol=1e-5)
    p, keep = encode_passages(params, cfg, ids(MASK), LENGTHS, SKIP)
    np.testing.assert_allclose(p, theirs * np.asarray(keep)[:, :, None], atol=1e-5)


def test_passages_keep_real_tokens_that_are_not_punctuation(params: dict) -> None:
    p, keep = encode_passages(params, config(), ids(0), LENGTHS, SKIP)
    np.testing.assert_array_equal(keep, REAL & (ids(0) != COMMA))
    assert p.dtype == np.float32 and p.shape == (3, W, 12)
    np.testing.assert_allclose(np.linalg.norm(p, axis=-1), keep, atol=1e-6)
    everything, kept = encode_passages(params, config(), ids(0), LENGTHS, np.zeros(V, bool))
    np.testing.assert_array_equal(kept, REAL)
    np.testing.assert_allclose(np.where(keep[:, :, None], everything, 0), p, atol=1e-6)  # skipped, yet attended to


def test_passages_do_not_see_padding(params: dict) -> None:
    one, _ = encode_passages(params, config(), ids(0), LENGTHS, SKIP)
    other, _ = encode_passages(params, config(), ids(21), LENGTHS, SKIP)
    np.testing.assert_array_equal(one, other)


def test_a_row_without_passage_is_zero_and_has_a_finite_gradient(params: dict) -> None:
    none = np.array([0, 5, 2])
    p, keep = encode_passages(params, config(), ids(0), none, SKIP)
    assert not keep[0].any() and (np.asarray(p[0]) == 0).all()
    total = jax.jit(jax.grad(lambda q: F.encode_passages(q, config(), ids(0), none, SKIP)[0].sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(total))


def test_a_zero_vector_has_a_finite_gradient(params: dict) -> None:
    dead = params | {"projection": np.zeros_like(params["projection"])}
    grads = jax.jit(jax.grad(lambda q: F.encode_queries(q, config(), ids(MASK), LENGTHS).sum()))(dead)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_augmented_queries_count_every_position(params: dict) -> None:
    q = encode_queries(params, config(), ids(MASK), LENGTHS)
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("attended", [False, True])
def test_attention_to_mask_tokens_is_a_choice(params: dict, attended: bool) -> None:
    cfg = config(attend_to_mask_tokens=attended)
    one = encode_queries(params, cfg, ids(MASK), LENGTHS)
    other = encode_queries(params, cfg, ids(MASK + 1), LENGTHS)
    unchanged = np.allclose(np.asarray(one)[REAL], np.asarray(other)[REAL], atol=1e-6)
    assert unchanged is not attended
    assert not np.allclose(np.asarray(one)[~REAL], np.asarray(other)[~REAL], atol=1e-3)


def test_without_augmentation_padding_is_zero(params: dict) -> None:
    q = encode_queries(params, config(augment_queries=False), ids(0), LENGTHS)
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), REAL, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(q)[REAL], np.asarray(encode_queries(params, config(), ids(0), LENGTHS))[REAL], atol=1e-6
    )


@pytest.mark.parametrize("augmented", [True, False])
def test_importance_is_the_length_of_a_query_vector(params: dict, augmented: bool) -> None:
    """One before any training; then exp(<q, u>), of queries alone."""
    plain, cfg = config(augment_queries=augmented), config(augment_queries=augmented, importance=True)
    first = F.init_colbert(cfg, jax.random.key(0))
    assert first["importance"].shape == (12,) and not first["importance"].any()
    q = encode_queries(params, plain, ids(MASK), LENGTHS)
    np.testing.assert_array_equal(
        encode_queries(params | {"importance": first["importance"]}, cfg, ids(MASK), LENGTHS), q
    )
    u = np.random.default_rng(0).normal(size=12).astype(np.float32)
    weighted = params | {"importance": u}
    got = encode_queries(weighted, cfg, ids(MASK), LENGTHS)
    np.testing.assert_allclose(got, q * np.exp(q @ u)[..., None], rtol=1e-5)
    counted = np.ones((3, W), bool) if augmented else REAL
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1)[counted], np.exp(q @ u)[counted], rtol=1e-5)
    for got, want in zip(
        encode_passages(weighted, cfg, ids(0), LENGTHS, SKIP),
        encode_passages(params, plain, ids(0), LENGTHS, SKIP),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_importance_beside_adapters_must_be_among_what_trains() -> None:
    with pytest.raises(ValueError, match="name it in retriever.lora.whole"):
        config(importance=True, lora={"rank": 2})
    assert config(importance=True, lora={"rank": 2, "whole": ("projection", "importance")}).importance


def test_axes_cover_the_tree() -> None:
    axes = F.logical_axes(config())
    assert axes["projection"] == ("embed", "token_vector")
    ranks = jax.tree.map(lambda x, a: len(x.shape) == len(a), F.abstract_params(config()), axes)
    assert all(jax.tree.leaves(ranks))
