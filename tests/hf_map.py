"""Weights and configurations of transformers' models in this project's layout, for parity tests.

Hugging Face stores linear weights [out, in] with heads flattened; here they are [in, out] with heads apart.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jmlr_jax.config_models import BertConfig, LlamaConfig, RopeScalingConfig


def _numpy(module: Any) -> dict[str, np.ndarray]:
    return {k: v.detach().float().numpy() for k, v in module.state_dict().items()}


def _stacked(layers: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    return {k: jnp.asarray(np.stack([layer[k] for layer in layers])) for k in layers[0]}


def llama_config(hf: Any) -> LlamaConfig:
    """Our configuration of a Llama, Mistral, Qwen2 or Qwen3 model."""
    rope = dict(hf.rope_parameters)
    kind = rope.get("rope_type", "default")
    scaling = None
    if kind != "default":
        names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        scaling = RopeScalingConfig(
            type=kind,
            original_max_positions=rope.get("original_max_position_embeddings"),
            **{k: rope[k] for k in names if rope.get(k) is not None},
        )
    return LlamaConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None),
        max_positions=hf.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        rms_norm_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type == "qwen3",
        sliding_window=getattr(hf, "sliding_window", None),
    )


def llama_params(model: Any, cfg: LlamaConfig) -> dict[str, Any]:
    """Parameters of a transformers ...ForCausalLM."""
    w = _numpy(model)
    E = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    layers = []
    for i in range(cfg.num_layers):
        pre = f"model.layers.{i}."
        layer = {
            "attn_norm": w[pre + "input_layernorm.weight"],
            "mlp_norm": w[pre + "post_attention_layernorm.weight"],
            "o": w[pre + "self_attn.o_proj.weight"].T.reshape(cfg.num_heads, E, -1),
        }
        for name in "qkv":
            layer[name] = w[f"{pre}self_attn.{name}_proj.weight"].T.reshape(cfg.hidden_size, -1, E)
            if cfg.qkv_bias:
                layer[f"{name}_bias"] = w[f"{pre}self_attn.{name}_proj.bias"].reshape(-1, E)
        for name in "qk" if cfg.qk_norm else "":
            layer[f"{name}_norm"] = w[f"{pre}self_attn.{name}_norm.weight"]
        for name in ("gate", "up", "down"):
            layer[name] = w[f"{pre}mlp.{name}_proj.weight"].T
        layers.append(layer)
    params = {
        "embed": jnp.asarray(w["model.embed_tokens.weight"]),
        "layers": _stacked(layers),
        "final_norm": jnp.asarray(w["model.norm.weight"]),
    }
    if not cfg.tie_embeddings:
        params["lm_head"] = jnp.asarray(w["lm_head.weight"].T)
    return params


def bert_config(hf: Any) -> BertConfig:
    """Our configuration of a BertModel."""
    return BertConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        max_positions=hf.max_position_embeddings,
        type_vocab_size=hf.type_vocab_size,
        layer_norm_eps=hf.layer_norm_eps,
        hidden_act=hf.hidden_act,
    )


def bert_params(model: Any, cfg: BertConfig) -> dict[str, Any]:
    """Parameters of a transformers BertModel, pooler aside; every other key must have been used."""
    w = {k: v for k, v in _numpy(model).items() if not k.startswith("pooler.")}
    H, E = cfg.num_heads, cfg.hidden_size // cfg.num_heads
    layers = []
    for i in range(cfg.num_layers):
        pre = f"encoder.layer.{i}."
        layer = {}
        for name, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            layer[name] = w.pop(f"{pre}attention.self.{theirs}.weight").T.reshape(-1, H, E)
            layer[f"{name}_bias"] = w.pop(f"{pre}attention.self.{theirs}.bias").reshape(H, E)
        layer["o"] = w.pop(f"{pre}attention.output.dense.weight").T.reshape(H, E, -1)
        layer["o_bias"] = w.pop(f"{pre}attention.output.dense.bias")
        for name, theirs in (("up", "intermediate.dense"), ("down", "output.dense")):
            layer[name] = w.pop(f"{pre}{theirs}.weight").T
            layer[f"{name}_bias"] = w.pop(f"{pre}{theirs}.bias")
        for name, theirs in (("attn_norm", "attention.output.LayerNorm"), ("mlp_norm", "output.LayerNorm")):
            layer[name] = w.pop(f"{pre}{theirs}.weight")
            layer[f"{name}_bias"] = w.pop(f"{pre}{theirs}.bias")
        layers.append(layer)
    params = {
        "word": jnp.asarray(w.pop("embeddings.word_embeddings.weight")),
        "position": jnp.asarray(w.pop("embeddings.position_embeddings.weight")),
        "token_type": jnp.asarray(w.pop("embeddings.token_type_embeddings.weight")),
        "embed_norm": jnp.asarray(w.pop("embeddings.LayerNorm.weight")),
        "embed_norm_bias": jnp.asarray(w.pop("embeddings.LayerNorm.bias")),
        "layers": _stacked(layers),
    }
    assert not w, f"keys without a place: {sorted(w)}"
    return params
