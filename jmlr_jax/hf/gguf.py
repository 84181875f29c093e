"""GGUF files of decoders, read as if they were Hugging Face checkpoints: configuration, weights, tokenizer.

One file holds it all, under the names of llama.cpp. Each architecture is a row of a table; what a row does not say is
refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from jmlr_jax.hf import config, llama
from jmlr_jax.hf.gguf_file import GGUFEntry, GGUFFile, read_gguf
from jmlr_jax.hf.gguf_tokenizer import special_ids, tokenizer_of
from jmlr_jax.hf.io import HFError
from jmlr_jax.hf.table import expected, gather, leaves
from jmlr_jax.nn.functional import abstract_params

_ELSEWHERE = "import the model's Hugging Face directory instead"


@dataclass(frozen=True)
class _Architecture:
    """How a ``general.architecture`` is written.

    `tensors`: a key of the Hugging Face checkpoint -> the name there, ``{}`` being the layer. `paired`: names whose
    rows lie in the pairs that the rotary embedding turns; the value says which heads. `raised`: whether norms are
    stored with the one that the model adds to them. `fields`: read where they are there, beside those of all.
    """

    hf_class: str
    tensors: Mapping[str, str]
    paired: Mapping[str, str]
    raised: bool = False
    fields: frozenset[str] = frozenset()


_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"
_LLAMA_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
}
_GEMMA3_TENSORS = _LLAMA_TENSORS | {
    "model.layers.{}.self_attn.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blk.{}.attn_k_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.post_attention_norm.weight",
    "model.layers.{}.pre_feedforward_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.post_feedforward_layernorm.weight": "blk.{}.post_ffw_norm.weight",
}
# Mistral's files say llama too. Of Qwen 2 and 3 (more tensors, no pairs) there is no row yet.
_ARCHITECTURES = {
    "llama": _Architecture(
        "LlamaForCausalLM", _LLAMA_TENSORS, {"blk.{}.attn_q.weight": _HEADS, "blk.{}.attn_k.weight": _KV_HEADS}
    ),
    "gemma3": _Architecture(
        "Gemma3ForCausalLM", _GEMMA3_TENSORS, {}, raised=True, fields=frozenset({"attention.sliding_window"})
    ),
}
# Fields of an architecture, under its name. Stated by every file:
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": _HEADS,
}
# Read where they are there, by `_config` and `_rope`:
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"}
_OPTIONAL |= {"attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"}
_OPTIONAL |= {"rope.scaling.type", "rope.scaling.factor"}
_HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
# Must have this value, which is what is computed here.
_FIXED = {"expert_count": 0, "expert_used_count": 0, "rope.scale_linear": 1.0, "attention.causal": True}
_ROPE_FREQS = "rope_freqs.weight"  # of Llama 3.1 and later: what each frequency is divided by
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # all of them


@dataclass(frozen=True)
class GGUFModel:
    """A checkpoint: the content of its config.json and generation_config.json, tensors by Hugging Face's keys."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    entries: dict[str, GGUFEntry]
    tokenizer: PreTrainedTokenizerFast


def open_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Reads what a GGUF file says; its tensors are read and dequantised one by one, when their turn comes.

    Args:
        path: a file on a local disk with the whole model; ``general.architecture`` is llama or gemma3.

    Raises:
        HFError: the file is damaged, or a field, tensor, quantisation or tokenizer is not read here; all are named.
    """
    file = read_gguf(path)
    name = file.fields.get("general.architecture")
    if file.fields.get("general.type", "model") != "model":
        raise HFError(f"{file.path}: general.type is {file.fields['general.type']!r}; only a model can be imported")
    if name not in _ARCHITECTURES:
        raise HFError(
            f"{file.path}: general.architecture is {name!r}; read here are {', '.join(_ARCHITECTURES)}: {_ELSEWHERE}"
        )
    made = _ARCHITECTURES[name]
    tokenizer = tokenizer_of(file)
    ids = special_ids(file)
    raw = _config(file, name, made) | ids
    generation: dict[str, Any] = {key: number for key, number in ids.items() if key != "unk_token_id"}
    # Of chat models the end of a message is an end too.
    ends = [file.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    if len(ends := list(dict.fromkeys(end for end in ends if end is not None))) > 1:
        generation["eos_token_id"] = ends
    return GGUFModel(raw, generation, _entries(file, made, raw), tokenizer)


def _config(file: GGUFFile, name: str, made: _Architecture) -> dict[str, Any]:
    """The content of config.json, special tokens aside."""
    said = {key[len(name) + 1 :]: value for key, value in file.fields.items() if key.startswith(f"{name}.")}
    faults = [f"{name}.{key} is missing" for key in _SIZES if key not in said]
    for key, value in said.items():
        if key in _FIXED and value != _FIXED[key]:
            faults.append(f"{name}.{key} is {value!r}; only {_FIXED[key]!r} is computed here")
        elif isinstance(value, list) or (key in _SIZES and not (isinstance(value, int) and value > 0)):
            faults.append(f"{name}.{key} is {value!r}; computed here is one positive number for all layers")
        elif key not in {*_SIZES, *_OPTIONAL, *_HARMLESS, *_FIXED, *made.fields}:
            faults.append(f"{name}.{key} is not known here, so nobody can say whether it changes the computation")
    if "token_embd.weight" not in file.tensors:
        faults.append("token_embd.weight is missing")
    _stop(faults, file)
    heads = said["attention.head_count"]
    head_dim = said.get("attention.key_length", said.get("rope.dimension_count", said["embedding_length"] // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, head_dim) != head_dim:
            faults.append(f"{name}.{key} is {said[key]}; only the head's whole width, {head_dim}, is computed here")
    rows = file.tensors["token_embd.weight"].shape[0]
    tokens = len(file.fields["tokenizer.ggml.tokens"])
    if {rows, tokens, said.get("vocab_size", rows)} != {rows}:
        faults.append(
            f"token_embd.weight has {rows} rows, the tokenizer {tokens} tokens, {name}.vocab_size is "
            f"{said.get('vocab_size')}; they have to agree"
        )
    rope, rope_faults = _rope(file, said, name)
    _stop(faults + rope_faults, file)
    own = _gemma3(said, rope) if name == "gemma3" else {"hidden_act": "silu", "mlp_bias": False}
    return {
        "architectures": [made.hf_class],
        "model_type": config.DECODERS[made.hf_class].model_type,
        **{hf: said[key] for key, hf in _SIZES.items()},
        _KV_HEADS: said.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": rows,
        "rms_norm_eps": _decimal(said.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": False,
        **own,
    }


def _gemma3(said: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of Gemma 3 leaves to whoever runs it: kinds of layers, their rotations, the scale of scores.

    Of the largest model, which alone has 62 layers, scores are divided by the root of width over heads.
    """
    heads, layers = said["attention.head_count"], said["block_count"]
    width = said["embedding_length"] // heads
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width if layers == 62 else said.get("attention.key_length", width),
        "sliding_window": said.get("attention.sliding_window"),
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        "rope_parameters": {
            "full_attention": dict(rope),
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def _rope(file: GGUFFile, said: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """The content of rope_parameters, and what is wrong with the rotary scaling."""
    theta = _decimal(said.get("rope.freq_base", 10000.0))
    kind, plain = said.get("rope.scaling.type", "none"), {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and "rope.scaling.factor" in said and _ROPE_FREQS not in file.tensors:
        return {"rope_type": "linear", "rope_theta": theta, "factor": _decimal(said["rope.scaling.factor"])}, []
    if kind != "none":
        return plain, [f"{name}.rope.scaling.type is {kind!r}; read here are linear, with a factor, and none"]
    if _ROPE_FREQS not in file.tensors:
        return plain, []
    divisors = np.asarray(file.tensors[_ROPE_FREQS].read(), np.float64)
    factor = _decimal(divisors.max())
    frequency = theta ** -(np.arange(len(divisors)) / len(divisors))
    turns = _LLAMA3["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / (kept + (1 - kept) / factor), rtol=1e-4):
        return plain, [f"{_ROPE_FREQS} holds another rotary scaling than Llama 3's, which config.json cannot say"]
    return {**_LLAMA3, "rope_type": "llama3", "rope_theta": theta, "factor": factor}, []


def _entries(file: GGUFFile, made: _Architecture, raw: Mapping[str, Any]) -> dict[str, GGUFEntry]:
    """Tensors by Hugging Face's keys: each that the model needs, and no other; HFError speaks of the file's names."""
    shape = config.llama_from_hf(raw, os.fspath(file.path))
    wanted = expected(llama.llama_rows(shape), leaves(abstract_params(shape)))
    template = {hf.format(layer): (there, layer) for hf, there in made.tensors.items() for layer in _layers(hf, shape)}
    names = {key: template[key][0].format(template[key][1]) for key in wanted}
    unknown = set(file.tensors) - set(names.values()) - {_ROPE_FREQS}
    lost = set(names.values()) - set(file.tensors)
    faults = [f"missing: {', '.join(gather(sorted(lost)))}"] if lost else []
    faults += [f"unknown: {', '.join(gather(sorted(unknown)))}"] if unknown else []
    entries = {}
    for key, there in names.items():
        if there in lost:
            continue
        entry, (*_, needed) = file.tensors[there], wanted[key]
        if entry.shape != needed:
            faults.append(f"{there} has shape {list(entry.shape)} where its fields ask for {list(needed)}")
        heads = raw[made.paired[template[key][0]]] if template[key][0] in made.paired else 0
        entries[key] = replace(entry, heads=heads, raised=made.raised and there.endswith("norm.weight"))
    if faults:
        _stop([f"tensors do not fit the model that its fields describe: {'; '.join(faults)}; {_ELSEWHERE}"], file)
    return entries


def _layers(key: str, shape: Any) -> range:
    return range(shape.num_layers if "{}" in key else 1)


def _decimal(x: float) -> float:
    """The shortest decimal of a number that the file holds as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _stop(faults: list[str], file: GGUFFile) -> None:
    if faults:
        raise HFError("\n".join(f"{file.path}: {fault}" for fault in faults))
