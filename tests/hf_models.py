"""Tiny random models of every family that is exchanged, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

torch.set_num_threads(1)  # the models are so small that threads only wait for one another
VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def rope(kind: str, **more: float) -> dict[str, Any]:
    """Fields of a scaled rotary embedding."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


# Lengths and bases are chosen so that some frequencies are kept, some scaled, and some lie between.
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=96)
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
# Layers of both kinds with a remainder, and a window that most rows are longer than.
GEMMA3 = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,
    "layer_types": [*["sliding_attention"] * 2, "full_attention", *["sliding_attention"] * 2],
    "tie_word_embeddings": True,
    "pad_token_id": None,  # its row would have no gradient there
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, tied, own head width": (transformers.LlamaConfig, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama, linear": (transformers.LlamaConfig, rope("linear", factor=4.0)),
    "llama, dynamic": (transformers.LlamaConfig, rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}),
    "llama, llama3": (transformers.LlamaConfig, LLAMA3 | {"max_position_embeddings": 128}),
    "llama, yarn": (transformers.LlamaConfig, rope("yarn", **YARN) | {"max_position_embeddings": 256}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5, "num_key_value_heads": 1}),
    "mistral, no window": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, window, yarn": (
        transformers.Qwen2Config,
        rope("yarn", **YARN, beta_fast=2.0, beta_slow=0.25, attention_factor=1.2)
        | {"max_position_embeddings": 256, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3, yarn": (
        transformers.Qwen3Config,
        rope("yarn", **YARN) | {"head_dim": 16, "max_position_embeddings": 256},
    ),
    "qwen3, two kinds of layers": (
        transformers.Qwen3Config,
        {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 6, "use_sliding_window": True}
        | {"max_window_layers": 1},
    ),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA3),
    "gemma3, linear": (
        transformers.Gemma3TextConfig,
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 12},
    ),
}


def randomise(model: torch.nn.Module) -> None:
    """Every weight random: norms start at 1 and biases at 0, which would hide a mistake in them."""
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)


def decoder(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Saves a decoder of a family in `dtype`; returns transformers' reading of it, in float32."""
    make, own = FAMILIES[name]
    shard = changes.pop("max_shard_size", "5GB")
    torch.manual_seed(0)
    described = make(**(SHAPE | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(described)
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def nested(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Saves a Gemma 3 that sees images; returns transformers' reading of it, in float32."""
    torch.manual_seed(0)
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    described = transformers.Gemma3Config(
        text_config=SHAPE | GEMMA3 | {"model_type": "gemma3_text"},
        vision_config=sees | {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    model = transformers.Gemma3ForConditionalGeneration(described)
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    kind = transformers.Gemma3ForConditionalGeneration
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


MODERN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "local_attention": 8,
    "pad_token_id": None,  # its row would have no gradient there
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}


def modern(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Saves a small ModernBertModel; returns transformers' reading of it, in float32."""
    torch.manual_seed(0)
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**(MODERN | changes)))
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    kind = transformers.ModernBertModel
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def encoder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Saves a small BertModel; returns transformers' reading of it, in float32."""
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    torch.manual_seed(0)
    described = transformers.BertConfig(**(shape | {"num_attention_heads": 4, "max_position_embeddings": 40} | changes))
    model = transformers.BertModel(described)
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    return transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
