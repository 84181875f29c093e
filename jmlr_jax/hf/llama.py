"""Key table of the decoders: Llama, Mistral, Qwen 2 and 3, Gemma 3, each as transformers' ``...ForCausalLM``."""

from __future__ import annotations

import re

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.hf.table import Row

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{}."
# Frequencies that old checkpoints store; they follow from config.json.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def llama_rows(cfg: LlamaConfig) -> tuple[Row, ...]:
    """One row for each leaf of ``init_llama(cfg, ...)``."""
    rows = [
        Row("embed", EMBED, "v d -> v d"),
        Row("final_norm", "model.norm.weight", "d -> d"),
        Row("layers.attn_norm", _LAYER + "input_layernorm.weight", "d -> d"),
        Row("layers.o", _LAYER + "self_attn.o_proj.weight", "d (h e) -> h e d"),
        Row("layers.gate", _LAYER + "mlp.gate_proj.weight", "f d -> d f"),
        Row("layers.up", _LAYER + "mlp.up_proj.weight", "f d -> d f"),
        Row("layers.down", _LAYER + "mlp.down_proj.weight", "d f -> f d"),
    ]
    norms = {"mlp_norm": "post_attention"}
    if cfg.block == "gemma":
        norms = {"attn_out_norm": "post_attention", "mlp_norm": "pre_feedforward", "mlp_out_norm": "post_feedforward"}
    rows += [Row(f"layers.{name}", f"{_LAYER}{theirs}_layernorm.weight", "d -> d") for name, theirs in norms.items()]
    for name in "qkv":
        rows.append(Row(f"layers.{name}", f"{_LAYER}self_attn.{name}_proj.weight", "(h e) d -> d h e"))
        if cfg.qkv_bias:
            rows.append(Row(f"layers.{name}_bias", f"{_LAYER}self_attn.{name}_proj.bias", "(h e) -> h e"))
    if cfg.qk_norm:
        rows += [Row(f"layers.{name}_norm", f"{_LAYER}self_attn.{name}_norm.weight", "e -> e") for name in "qk"]
    if not cfg.tie_embeddings:
        rows.append(Row("lm_head", HEAD, "v d -> d v"))
    return tuple(rows)


def canonical(key: str) -> str | None:
    """The table's name of a key of a checkpoint, whatever stands around the decoder; None if known and not needed."""
    if _DERIVED.fullmatch(key) or is_vision(key):
        return None
    for prefix in ("language_model.", "model.language_model."):
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
    return key


def is_vision(key: str) -> bool:
    """Whether a tensor belongs to the part of a model that sees images, which is left out."""
    return key.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector."))
