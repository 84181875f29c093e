"""Decoders read from a directory compute what transformers computes from the same directory.

Tolerance: both sides are float32 and differ in the order of their sums. Over widths of 16 to 48 and two layers that
leaves some 1e-6 of values near 10; 1e-4 is the bound stated to users, and a transposed matrix, a wrong head order or a
missing bias is off by more than 1.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.hf.export import tensors_of
from jmlr_jax.hf.llama import llama_rows
from jmlr_jax.hf.load import load_generator
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.layers import Params
from jmlr_jax.parallel.sharding import make_mesh

T = 20
LENGTHS = np.array([20, 13])
TOLERANCE = 1e-4
ASKED = LlamaConfig(max_positions=16)


@partial(jax.jit, static_argnums=1)
def forward(params: Params, cfg: LlamaConfig, ids: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states and logits at every position."""
    hidden = F.llama_hidden(params, cfg, ids, length)
    return hidden, F.llama_logits(params, cfg, hidden)


def tokens(rows: int = 2, length: int = T) -> np.ndarray:
    return np.random.default_rng(0).integers(0, hf_models.VOCAB, (rows, length))


def answer_loss(params: Params, cfg: LlamaConfig, ids: np.ndarray) -> jax.Array:
    """Mean loss of every next token."""
    logp = jax.nn.log_softmax(forward(params, cfg, jnp.asarray(ids), jnp.full(len(ids), ids.shape[1]))[1][:, :-1])
    return -jnp.take_along_axis(logp, jnp.asarray(ids)[:, 1:, None], -1).mean()


@pytest.mark.parametrize("name", hf_models.FAMILIES)
def test_logits_and_hidden_states(name: str, tmp_path: Path) -> None:
    """Right padding here, left padding there: the same values at the real tokens."""
    model = hf_models.decoder(name, tmp_path)
    cfg, params = load_generator(str(tmp_path), ASKED)
    ids = tokens()
    ours, logits = forward(params, cfg, ids, LENGTHS)
    for row, n in sorted(enumerate(LENGTHS), key=lambda item: item[1]):  # dynamic scaling there: the longest so far
        with torch.no_grad():
            out = model(torch.tensor(ids[row : row + 1, :n]), output_hidden_states=True)
        assert out.logits.abs().max() > 1
        np.testing.assert_allclose(ours[row, :n], out.hidden_states[-1][0].numpy(), atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(logits[row, :n], out.logits[0].numpy(), atol=TOLERANCE, rtol=0)
    if "dynamic" in name:
        return  # its rotation there follows the padded length, here each row's own
    mask = torch.tensor([[0] * (T - n) + [1] * n for n in LENGTHS])
    left = torch.tensor([[0] * (T - n) + list(ids[row, :n]) for row, n in enumerate(LENGTHS)])
    with torch.no_grad():
        out = model(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits.numpy()
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :n], out[row, T - n :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_every_dtype_on_disk(name: str, dtype: str, tmp_path: Path) -> None:
    """Widened to float32, every weight is the stored number and logits are torch's; kept as it is, the same bits."""
    model = hf_models.decoder(name, tmp_path, getattr(torch, dtype))
    wanted = {key: value.numpy() for key, value in model.state_dict().items() if key in dict(model.named_parameters())}
    for param_dtype in ("float32", dtype):
        cfg, params = load_generator(str(tmp_path), ASKED.model_copy(update={"param_dtype": param_dtype}))
        found = {tensor.name: tensor.read() for tensor in tensors_of(llama_rows(cfg), params)}
        assert {value.dtype for value in found.values()} == {jnp.dtype(param_dtype)}
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(found[key].astype(np.float32), value, err_msg=key)
        if param_dtype == "float32":
            with torch.no_grad():
                theirs = model(torch.tensor(tokens())).logits.numpy()
            np.testing.assert_allclose(forward(params, cfg, tokens(), np.full(2, T))[1], theirs, atol=TOLERANCE, rtol=0)


@partial(jax.jit, static_argnums=1)
def step(params: Params, cfg: LlamaConfig, ids: np.ndarray) -> tuple[jax.Array, Params]:
    """Loss and gradients."""
    return jax.value_and_grad(answer_loss)(params, cfg, ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_one_training_step(name: str, dtype: str, tmp_path: Path) -> None:
    """Loss and every gradient, carried back under transformers' names by the table that exports weights, from weights
    stored in each dtype."""
    model = hf_models.decoder(name, tmp_path, getattr(torch, dtype))
    cfg, params = load_generator(str(tmp_path), ASKED)
    loss, grads = step(params, cfg, tokens())
    ids = torch.tensor(tokens())
    theirs = model(ids, labels=ids).loss
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    wanted = {key: p.grad.numpy() for key, p in model.named_parameters()}
    found = {tensor.name: tensor.read() for tensor in tensors_of(llama_rows(cfg), grads)}
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        np.testing.assert_allclose(found[key], grad, atol=1e-4, rtol=1e-3, err_msg=key)


def test_long_context(tmp_path: Path) -> None:
    """4,096 tokens with Llama 3's scaling: the last position's logits, which see every rotation."""
    # Angles of thousands of radians would show the last bit of a frequency: 4,096 * 2**-24 is more than the tolerance.
    scaled = hf_models.rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    changes = scaled | {"max_position_embeddings": 8192, "num_hidden_layers": 1}
    model = hf_models.decoder("llama, llama3", tmp_path, **changes)
    cfg, params = load_generator(str(tmp_path), LlamaConfig(max_positions=4096))
    ids = tokens(1, 4096)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        theirs = model(torch.tensor(ids), logits_to_keep=64).logits.numpy()
    logits = forward(params, cfg, ids, np.array([4096]))[1]
    np.testing.assert_allclose(logits[:, -64:], theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3")] + [("llama", "float16")],
)
def test_narrow_throughout(name: str, dtype: str, tmp_path: Path) -> None:
    """Weights and activations in 16 bits on both sides, which round at different places. What such rounding costs is
    what transformers loses against its own float32; ours may lose twice that, on average over all logits."""
    exact = hf_models.decoder(name, tmp_path, getattr(torch, dtype))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    cfg, params = load_generator(str(tmp_path), ASKED.model_copy(update={"dtype": dtype, "param_dtype": dtype}))
    with torch.no_grad():
        true, theirs = (m(torch.tensor(tokens())).logits.float().numpy() for m in (exact, model))
    ours = np.asarray(forward(params, cfg, tokens(), np.full(2, T))[1])
    assert np.abs(ours - true).mean() < 2 * np.abs(theirs - true).mean() < 0.1 * true.std()


def test_mesh(tmp_path: Path) -> None:
    """On eight devices: every weight where the rule table puts it, and bit for bit what one device holds."""
    hf_models.decoder("qwen2", tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    asked = ASKED.model_copy(update={"vocab_size": 64})
    cfg, params = load_generator(str(tmp_path), asked, mesh)
    _, alone = load_generator(str(tmp_path), asked)
    assert params["embed"].sharding.spec == PartitionSpec("tensor", "fsdp") and cfg.vocab_size == 64
    assert params["layers"]["q"].addressable_shards[0].data.shape == (2, 16, 2, 8)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, alone)


def test_added_rows_are_the_mean(tmp_path: Path) -> None:
    model = hf_models.decoder("llama", tmp_path)
    cfg, params = load_generator(str(tmp_path), ASKED, tokens=63)
    assert cfg.vocab_size == 63 and params["lm_head"].shape == (32, 63)
    for ours, theirs in ((params["embed"], model.model.embed_tokens), (params["lm_head"].T, model.lm_head)):
        rows = theirs.weight.detach().numpy()
        np.testing.assert_array_equal(ours[:61], rows)
        np.testing.assert_allclose(ours[61:], np.broadcast_to(rows.mean(0), (2, 32)), atol=1e-6)
