"""``config.json`` of a retriever's trunk, BERT or ModernBERT, to our configuration and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import transformers

from jmlr_jax.config_models import BertConfig
from jmlr_jax.hf.fields import (
    FIXED,
    SIZES,
    check_round_trip,
    kinds_from_hf,
    kinds_to_hf,
    normalised,
    refused,
    refused_layers,
    say_dtype,
    stop,
)
from jmlr_jax.hf.io import HFError

COLBERT = "HF_ColBERT"  # colbert-ai's class, around any trunk
# Classes around each trunk, the plain one first; their heads are not read.
ENCODERS = {
    "bert": ("BertModel", "BertForMaskedLM", "BertForPreTraining", COLBERT),
    "modernbert": ("ModernBertModel", "ModernBertForMaskedLM", COLBERT),
}
_BERT_FIELDS = {*SIZES, "type_vocab_size", "layer_norm_eps", "hidden_act"}
_MODERN_FIELDS = {*SIZES, "norm_eps", "hidden_activation", "local_attention", "layer_types", "rope_parameters"}
_MODERN_FIELDS |= {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"}
_MODERN_FIXED = FIXED | {"norm_bias": False}
# Of ModernBERT: pre-training's head, how it is computed there, and fields of other models that its files carry along.
_MODERN_HARMLESS = frozenset(
    """embedding_dropout mlp_dropout decoder_bias classifier_pooling classifier_bias classifier_activation
    deterministic_flash_attn sparse_prediction sparse_pred_ignore_index reference_compile repad_logits_with_grad
    initializer_cutoff_factor layer_norm_eps tie_word_embeddings""".split()
)


def bert_from_hf(raw: Mapping[str, Any], where: str) -> BertConfig:
    """Shape of an encoder from the content of its config.json; dtypes and remat are left at their defaults.

    Raises:
        HFError: names every field that cannot be honoured.
    """
    named, kind = raw.get("architectures") or ["none"], str(raw.get("model_type"))
    if len(named) != 1 or named[0] not in ENCODERS.get(kind, ()):
        known = "; ".join(f"{kind} ({', '.join(classes)})" for kind, classes in ENCODERS.items())
        raise HFError(
            f"{where}: model_type is {kind}, architectures is {', '.join(named)}; a retriever's trunk is of model_type "
            f"{known}"
        )
    return _modern(raw, where) if kind == "modernbert" else _bert(raw, where)


def _bert(raw: Mapping[str, Any], where: str) -> BertConfig:
    fixed = FIXED | {"tie_word_embeddings": raw.get("tie_word_embeddings")}  # it concerns the pre-training head alone
    faults = refused(raw, _BERT_FIELDS, fixed)
    hf = normalised(raw, transformers.BertConfig, where)
    acts = get_args(BertConfig.model_fields["hidden_act"].annotation)
    if hf.hidden_act not in acts:
        faults.append(f"hidden_act is {hf.hidden_act!r}; known are {', '.join(acts)}")
    stop(faults, where)
    return BertConfig(
        **_sizes(hf), type_vocab_size=hf.type_vocab_size, layer_norm_eps=hf.layer_norm_eps, hidden_act=hf.hidden_act
    )


def _modern(raw: Mapping[str, Any], where: str) -> BertConfig:
    known = {name: value for name, value in raw.items() if name not in _MODERN_HARMLESS}
    stop(refused(known, _MODERN_FIELDS, _MODERN_FIXED) + refused_layers(raw), where)
    hf = normalised(raw, transformers.ModernBertConfig, where)
    fields, faults = kinds_from_hf(hf, hf.local_attention // 2)
    acts = get_args(BertConfig.model_fields["hidden_act"].annotation)
    if hf.hidden_activation not in acts:
        faults.append(f"hidden_activation is {hf.hidden_activation!r}; known are {', '.join(acts)}")
    stop(faults, where)
    return BertConfig(
        block="modernbert",
        **_sizes(hf),
        layer_norm_eps=hf.norm_eps,
        hidden_act=hf.hidden_activation,
        **fields,
    )


def _sizes(hf: Any) -> dict[str, int]:
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "max_positions": hf.max_position_embeddings,
    }


def bert_to_hf(
    cfg: BertConfig, architecture: str | None = None, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of config.json for an encoder.

    Args:
        cfg: what was computed; param_dtype becomes the stored dtype.
        architecture: the class; None takes the plain trunk's.
        like: config.json of the checkpoint that training began from, which keeps what is not ours to say.

    Raises:
        HFError: no transformers class computes this, or `like` describes another model.
    """
    raw: dict[str, Any] = {
        "model_type": cfg.block,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "max_position_embeddings": cfg.max_positions,
    }
    if cfg.block == "bert":
        raw |= {
            "hidden_act": cfg.hidden_act,
            "type_vocab_size": cfg.type_vocab_size,
            "layer_norm_eps": cfg.layer_norm_eps,
            "position_embedding_type": "absolute",
        }
    else:
        raw |= {
            "hidden_activation": cfg.hidden_act,
            "norm_eps": cfg.layer_norm_eps,
            "local_attention": 2 * (cfg.sliding_window or cfg.max_positions),
            "layer_types": kinds_to_hf(cfg),
            "global_rope_theta": cfg.rope_theta,
            "local_rope_theta": cfg.window_rope_theta or cfg.rope_theta,
            # The tokenizer says these; the class's own are ids of the published vocabulary, beyond a smaller one.
            **dict.fromkeys(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")),
        }
    raw = dict(like or raw) | {"architectures": [architecture or ENCODERS[cfg.block][0]], "vocab_size": cfg.vocab_size}
    say_dtype(raw, cfg.param_dtype)
    check_round_trip(cfg, bert_from_hf(raw, "config.json to be written"))
    return raw
