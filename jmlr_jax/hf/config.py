"""``config.json`` of decoders to our configuration and back: what changes the computation is honoured or refused.

Defaults of absent fields are those of transformers' own configuration classes; sizes must be stated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.hf.fields import (
    FIXED,
    SIZES,
    Model,
    check_round_trip,
    kinds_from_hf,
    kinds_to_hf,
    normalised,
    refused,
    refused_layers,
    rope_to_hf,
    say_dtype,
    stop,
)
from jmlr_jax.hf.io import HFError

# The class that a causal decoder's config.json names, and its transformers configuration.
DECODERS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
}
# A decoder with a part that sees images around it, which is left out: the decoder's fields are in text_config.
NESTED = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}

_LLAMA_FIELDS = {*SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"}
_LLAMA_FIELDS |= {"rope_theta", "rope_scaling", "rope_parameters"}
_WINDOW_FIELDS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_GEMMA_FIELDS = {"sliding_window", "layer_types", "rope_local_base_freq", "query_pre_attn_scalar"}
_GEMMA_FIELDS |= {"sliding_window_pattern", "_sliding_window_pattern"}
_FIELDS = {  # read by the functions below
    "llama": _LLAMA_FIELDS,
    "mistral": _LLAMA_FIELDS | {"sliding_window"},
    "qwen2": _LLAMA_FIELDS | _WINDOW_FIELDS,
    "qwen3": _LLAMA_FIELDS | _WINDOW_FIELDS,
    "gemma3_text": _LLAMA_FIELDS | _GEMMA_FIELDS,
}
_FIXED = FIXED | {"hidden_act": "silu"}
_GEMMA_GELU = "gelu_pytorch_tanh"
_GEMMA_FIXED = FIXED | {
    "hidden_act": _GEMMA_GELU,
    "hidden_activation": _GEMMA_GELU,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
# Beside text_config, of no consequence to text.
_OUTER = {"architectures", "model_type", "text_config", "vision_config", "boi_token_index", "eoi_token_index"}
_OUTER |= {"image_token_index", "mm_tokens_per_image", "initializer_range", "transformers_version"}
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "tie_word_embeddings")


def is_decoder(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of a decoder, of a class that is read here or not."""
    named = str((raw.get("architectures") or [""])[0])
    return named in DECODERS or named.endswith(("ForCausalLM", "ForConditionalGeneration"))


def text_of(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config.json of the decoder alone; `raw` itself where nothing is around it.

    Sizes that transformers' own class fills in are stated in what is returned.

    Raises:
        HFError: a field around it that is not known.
    """
    named = (raw.get("architectures") or [""])[0]
    if named not in NESTED:
        return raw
    inner = NESTED[named]
    kind, text = DECODERS[inner], dict(raw.get("text_config") or {})
    faults = refused({name: value for name, value in raw.items() if name not in _OUTER}, _SHARED, FIXED)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers")
    faults += [f"text_config.{name} is missing" for name in needed if name not in text]
    stop(faults, where)
    stated = kind()
    text |= {name: getattr(stated, name) for name in (*SIZES, "num_key_value_heads", "head_dim") if name not in text}
    shared = {name: raw[name] for name in _SHARED if raw.get(name) is not None and text.get(name) is None}
    return text | shared | {"architectures": [inner], "model_type": kind.model_type}


def llama_from_hf(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """Shape of a decoder from the content of its config.json; dtypes and remat are left at their defaults.

    Args:
        raw: the JSON object.
        where: the file, for errors.

    Raises:
        HFError: names every field that cannot be honoured.
    """
    raw = text_of(raw, where)
    named = raw.get("architectures") or ["none"]
    if len(named) != 1 or named[0] not in DECODERS:
        known = ", ".join([*DECODERS, *NESTED])
        raise HFError(f"{where}: architectures is {', '.join(named)}; read here are {known}")
    family = DECODERS[named[0]].model_type
    gemma = family == "gemma3_text"
    faults = refused(raw, _FIELDS[family], _GEMMA_FIXED if gemma else _FIXED) + refused_layers(raw)
    period = raw.get("_sliding_window_pattern", 6)  # with an underscore transformers writes it and reads layer_types
    if gemma and period != 6 and not raw.get("layer_types"):
        faults.append(f"_sliding_window_pattern is {period} without layer_types")
    stop(faults, where)
    hf = normalised(raw, DECODERS[named[0]], where)
    # Qwen names a window that no layer has.
    fields, faults = kinds_from_hf(hf, getattr(hf, "sliding_window", None) if family != "llama" else None)
    stop(faults, where)
    head_dim = getattr(hf, "head_dim", None)
    if head_dim is not None and head_dim * hf.num_attention_heads == hf.hidden_size:
        head_dim = None
    width = head_dim or hf.hidden_size // hf.num_attention_heads
    scalar = hf.query_pre_attn_scalar if gemma else width
    return LlamaConfig(
        block="gemma" if gemma else "llama",
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        max_positions=hf.max_position_embeddings,
        query_pre_attn_scalar=None if scalar == width else scalar,
        rms_norm_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3" or gemma,
        **fields,
    )


def llama_to_hf(cfg: LlamaConfig, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json for a decoder.

    Args:
        cfg: what was computed; param_dtype becomes the stored dtype.
        like: config.json of the checkpoint that training began from, which keeps its class and what is not ours to say.
            Of a decoder with a part that sees images, the decoder's alone is kept.

    Raises:
        HFError: no transformers class computes this, or `like` describes another model.
    """
    window, gemma = cfg.sliding_window, cfg.block == "gemma"
    architecture = "MistralForCausalLM" if window and None not in cfg.windows else "LlamaForCausalLM"
    if gemma:
        architecture = "Gemma3ForCausalLM"
    elif cfg.qk_norm or cfg.qkv_bias:
        architecture = "Qwen3ForCausalLM" if cfg.qk_norm else "Qwen2ForCausalLM"
    kind = DECODERS[architecture].model_type
    raw = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_width,
        "max_position_embeddings": cfg.max_positions,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": rope_to_hf(cfg.rope_scaling, cfg.max_positions),
        "rms_norm_eps": cfg.rms_norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    raw |= {"hidden_activation": _GEMMA_GELU} if gemma else {"hidden_act": "silu"}
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = False
    if gemma:
        raw |= {
            "query_pre_attn_scalar": cfg.query_pre_attn_scalar or cfg.head_width,
            "sliding_window": window,
            "layer_types": kinds_to_hf(cfg),
            "rope_local_base_freq": cfg.window_rope_theta or cfg.rope_theta,
        }
    elif kind == "mistral":
        raw["sliding_window"] = window
    elif window:
        raw |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds_to_hf(cfg)}
        raw["max_window_layers"] = next(i for i, width in enumerate(cfg.windows) if width)
    raw = dict(text_of(like, "config.json of the start") if like else raw) | {"vocab_size": cfg.vocab_size}
    say_dtype(raw, cfg.param_dtype)
    check_round_trip(cfg, llama_from_hf(raw, "config.json to be written"))
    return raw


def resolve(found: Model, asked: Model, tokens: int, key: str, where: str) -> Model:
    """The checkpoint's shape with the user's dtypes, remat and vocabulary.

    Args:
        found: from the checkpoint.
        asked: the section of the user's configuration. What was not set takes the checkpoint's value; what was set must
            agree with it. Fewer positions may be set: the checkpoint's stay.
        tokens: size of the tokenizer that is used with the model; 0 if there is none yet.
        key: the section's name, for errors.
        where: the checkpoint, for errors.

    Returns:
        `found` with `asked`'s dtype, param_dtype and remat. Its vocabulary has asked.vocab_size rows, or as many as the
        checkpoint and the tokenizer need.

    Raises:
        HFError: names every disagreement.
    """
    if isinstance(asked, LlamaConfig) and asked.head_dim and asked.head_dim * found.num_heads == found.hidden_size:
        asked = asked.model_copy(update={"head_dim": None})  # said twice
    own = ("vocab_size", "max_positions", "dtype", "param_dtype", "remat")
    faults = [
        f"{key}.{name}={getattr(asked, name)!r}, the checkpoint has {getattr(found, name)!r}; leave it out"
        for name in type(asked).model_fields
        if name in asked.model_fields_set and name not in own and getattr(asked, name) != getattr(found, name)
    ]
    if "max_positions" in asked.model_fields_set and asked.max_positions > found.max_positions:
        faults.append(f"{key}.max_positions={asked.max_positions}, the checkpoint has {found.max_positions}; lower it")
    least = max(found.vocab_size, tokens)
    if asked.vocab_size and asked.vocab_size < least:
        faults.append(
            f"{key}.vocab_size={asked.vocab_size} is below the checkpoint's {found.vocab_size} "
            f"or the tokenizer's {tokens}; 0 takes what both need"
        )
    stop(faults, where)
    taken = {name: getattr(asked, name) for name in ("dtype", "param_dtype", "remat")}
    return found.model_copy(update=taken | {"vocab_size": asked.vocab_size or least})
