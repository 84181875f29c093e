"""The encoder against transformers' BertModel, and what must hold of it alone."""

from __future__ import annotations

import hf_map
import jax
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax.config_models import BertConfig
from jmlr_jax.nn import functional as F

bert_hidden = jax.jit(F.bert_hidden, static_argnums=1)

V, T = 53, 13
LENGTHS = np.array([13, 7, 1])


def pair(act: str) -> tuple[torch.nn.Module, BertConfig, dict]:
    torch.manual_seed(0)
    hf = transformers.BertConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20,
        hidden_act=act,
    )
    model = transformers.BertModel(hf).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.4)
    cfg = hf_map.bert_config(hf)
    return model, cfg, hf_map.bert_params(model, cfg)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_hidden_states_equal_transformers(act: str) -> None:
    model, cfg, params = pair(act)
    ids = np.random.default_rng(0).integers(0, V, (3, T))
    mask = np.arange(T) < LENGTHS[:, None]
    ours = bert_hidden(params, cfg, ids, LENGTHS)
    with torch.no_grad():
        theirs = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], atol=1e-4, rtol=0)


def test_weights_have_the_shapes_of_the_model() -> None:
    """The mapper uses every key of BertModel but the pooler's (it asserts so); its tree is the one declared here."""
    _, cfg, params = pair("gelu")
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, F.abstract_params(cfg))


@pytest.mark.exhaustive
def test_gradient_does_not_depend_on_remat() -> None:
    cfg = BertConfig(vocab_size=V, num_layers=2)
    params = F.init_bert(cfg, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, V, (3, T))
    kept = cfg.model_copy(update={"remat": "full"})

    def gradient(cfg: BertConfig) -> dict:
        return jax.jit(jax.grad(lambda p: (F.bert_hidden(p, cfg, ids, LENGTHS) ** 3).sum()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient(kept), gradient(cfg))


def test_padding_is_seen_by_no_real_token() -> None:
    cfg = BertConfig(vocab_size=V)
    params = F.init_bert(cfg, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, V, (3, T))
    mask = np.arange(T) < LENGTHS[:, None]
    one = bert_hidden(params, cfg, ids, LENGTHS)
    other = bert_hidden(params, cfg, np.where(mask, ids, (ids + 1) % V), LENGTHS)
    np.testing.assert_array_equal(np.asarray(one)[mask], np.asarray(other)[mask])
    changed = bert_hidden(params, cfg, np.where(np.arange(T) == 5, (ids + 1) % V, ids), LENGTHS)
    assert not np.allclose(one[0, 0], changed[0, 0])  # and a real token is seen by those before it


def test_too_many_tokens_are_refused() -> None:
    cfg = BertConfig(vocab_size=V, max_positions=8)
    params = F.init_bert(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match="13 tokens a row exceed bert.max_positions=8"):
        F.bert_hidden(params, cfg, np.zeros((3, T), int), LENGTHS)
