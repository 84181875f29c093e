"""Tiny GGUF files, written by the format's own library from a decoder as transformers saves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import hf_models
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from tokenizers import Tokenizer

from jmlr_jax.data.tokenizers import train_generator_tokenizer
from jmlr_jax.hf.io import read_directory, read_json

VOCAB, HEADS, KV_HEADS = 288, 4, 2
WORDS = ["the kidney is hardened by age", "the liver heals, the heart does not", "a drug is a drug"]
KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    *((f"self_attn.{x}_proj", f"attn_{x}") for x in "qkv"),
    *((f"mlp.{x}_proj", f"ffn_{x}") for x in ("gate", "up", "down")),
]


def published(folder: Path, name: str = "llama", **changes: Any) -> Any:
    """A decoder with a byte-level tokenizer whose last ids are unused; returns transformers' reading of it."""
    model = hf_models.decoder(name, folder, vocab_size=VOCAB, **changes)
    train_generator_tokenizer(WORDS * 4, VOCAB - 4, str(folder))
    return model


def fields_of(folder: Path) -> dict[str, Any]:
    """What a GGUF file of this directory says."""
    raw = read_json(folder / "config.json")
    engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [engine.id_to_token(i) for i in range(engine.get_vocab_size())]
    unused = [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    merges = read_json(folder / "tokenizer.json")["model"]["merges"]
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": raw["num_hidden_layers"],
        "llama.context_length": raw["max_position_embeddings"],
        "llama.embedding_length": raw["hidden_size"],
        "llama.feed_forward_length": raw["intermediate_size"],
        "llama.attention.head_count": raw["num_attention_heads"],
        "llama.attention.head_count_kv": raw["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "llama.rope.freq_base": raw["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": raw["head_dim"],
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(unused),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """The weights under the format's names, rows of q and k in pairs as llama.cpp turns them."""
    found = {}
    for key, entry in read_directory(folder).items():
        value = np.array(entry.read())
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        if "attn_q" in key or "attn_k" in key:
            heads = HEADS if "attn_q" in key else KV_HEADS
            value = value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        found[key] = value
    return found


def write(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kinds: Mapping[str, Kind] | None = None
) -> Path:
    """Writes the file; a field that is None is left out, `kinds` says which tensors are quantised."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, KINDS[type(value)])
    for key, value in tensors.items():
        kind = (kinds or {}).get(key)
        if kind is None:
            writer.add_tensor(key, value)
        else:
            writer.add_tensor(key, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
