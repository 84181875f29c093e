"""Trained weights as the directories that other tools load: transformers, PEFT, colbert-ai, PyLate.

Tensors leave the devices one by one, so that a model larger than the host's memory can be written. All functions write
into a folder that is there; :func:`jmlr_jax.hf.io.whole_directory` makes one that appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlr_jax.config_models import LlamaConfig, LoraConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import GeneratorIds
from jmlr_jax.files import AnyPath, any_path
from jmlr_jax.hf import bert, config, encoder_config, layouts, llama
from jmlr_jax.hf.io import SINGLE, HFError, Tensor, write_directory, write_file, write_json
from jmlr_jax.hf.modules import IDENTITY, MODULES
from jmlr_jax.hf.table import Axes, Row, leaves
from jmlr_jax.nn.layers import Params
from jmlr_jax.nn.lora import merge

SHARD_BYTES = 5_000_000_000
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """Adapters: the tree of :func:`jmlr_jax.nn.lora.init_lora` and the configuration it was trained with."""

    cfg: LoraConfig
    tree: Params


def write_generator(
    folder: AnyPath,
    cfg: LlamaConfig,
    params: Params,
    ids: GeneratorIds,
    tokenizer: str | os.PathLike[str],
    *,
    lora: Lora | None = None,
    like: Mapping[str, Any] | None = None,
    max_new: int = 32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A causal decoder for ``transformers.AutoModelForCausalLM``: configuration, weights, tokenizer.

    Args:
        folder: an existing folder.
        cfg, params: the decoder; weights are stored in their own dtype.
        ids: of its tokenizer, for generation_config.json.
        tokenizer: directory of the tokenizer, copied.
        lora: adapters, merged into the weights that are written.
        like: config.json of the checkpoint that training began from.
        max_new: default length of an answer.
        shard_bytes: larger models are split into several files.

    Raises:
        HFError: no class of transformers computes what `cfg` describes.
    """
    write_json(folder / "config.json", config.llama_to_hf(cfg, like))
    ends = [ids.eos, *ids.stops] if ids.stops else ids.eos
    generation = {"bos_token_id": ids.bos, "eos_token_id": ends, "pad_token_id": ids.pad}
    write_json(folder / "generation_config.json", generation | {"do_sample": False, "max_new_tokens": max_new})
    write_directory(folder, tensors_of(llama.llama_rows(cfg), params, lora), shard_bytes)
    copy_tokenizer(tokenizer, folder)


def write_adapters(
    folder: AnyPath,
    cfg: LlamaConfig,
    lora: Lora,
    base: str,
    base_vocab: int,
    tokenizer: str | os.PathLike[str],
    *,
    nested: bool = False,
) -> None:
    """Adapters alone, for ``peft.PeftModel``: to be used with the very checkpoint that training began from.

    Args:
        folder: an existing folder.
        cfg: the decoder that was trained.
        lora: its adapters.
        base: directory or name of that checkpoint.
        base_vocab: rows of its embedding. An adapter of the head loses those beyond them, which were padding.
        tokenizer: directory of the tokenizer, copied.
        nested: the checkpoint holds the decoder beside a part that sees images, whose projections have the same names.
    """
    rows = [row for row in llama.llama_rows(cfg) if row.path.removeprefix("layers.") in lora.cfg.targets]
    modules: list[str] | str = [row.key.removesuffix(".weight").rsplit(".", 1)[-1] for row in rows]
    if nested:
        rows = [replace(row, key=row.key.replace("model.", "model.language_model.", 1)) for row in rows]
        modules = rf".*\.language_model\..*\.({'|'.join(modules)})"
    tensors = []
    for tensor in tensors_of([half for row in rows for half in _halves(row)], lora.tree):
        if "lm_head" in tensor.name and tensor.name.endswith("lora_B.weight"):
            shape = (base_vocab, *tensor.shape[1:])
            tensor = replace(tensor, shape=shape, read=partial(_first_rows, tensor, base_vocab))
        tensors.append(tensor)
    write_file(folder / "adapter_model.safetensors", tensors)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.cfg.rank,
        "lora_alpha": int(lora.cfg.alpha) if lora.cfg.alpha.is_integer() else lora.cfg.alpha,
        "lora_dropout": lora.cfg.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", described)
    copy_tokenizer(tokenizer, folder)


def write_colbert(
    folder: AnyPath,
    cfg: RetrieverConfig,
    params: Params,
    tokenizer: str | os.PathLike[str],
    *,
    like: Mapping[str, Any] | None = None,
) -> None:
    """A retriever for colbert-ai (``HF_ColBERT``): trunk and projection in one file, conventions in artifact.metadata.

    Args:
        folder: an existing folder.
        cfg, params: the retriever; weights are stored in their own dtype.
        tokenizer: directory of its tokenizer, copied.
        like: config.json of the checkpoint that training began from.

    Raises:
        HFError: queries without augmentation, which colbert-ai does not compute.
    """
    write_colbert_tensors(folder, cfg, tensors_of(bert.colbert_rows(cfg.bert, importance=cfg.importance), params), like)
    copy_tokenizer(tokenizer, folder)


def write_colbert_tensors(
    folder: AnyPath, cfg: RetrieverConfig, tensors: Sequence[Tensor], like: Mapping[str, Any] | None
) -> None:
    """:func:`write_colbert` without the tokenizer, from tensors under the names of :func:`bert.colbert_rows`."""
    if not cfg.augment_queries:
        raise HFError("colbert-ai always fills queries with [MASK]; retriever.augment_queries=false has no form there")
    write_json(folder / "config.json", encoder_config.bert_to_hf(cfg.bert, encoder_config.COLBERT, like))
    tensors, trunk = _without_importance(folder, tensors), bert.PREFIX[cfg.bert.block]
    named = [t if t.name == bert.PROJECTION else replace(t, name=trunk + t.name) for t in tensors]
    write_directory(folder, named, SHARD_BYTES)
    conventions = {
        "query_token_id": cfg.query_marker,
        "doc_token_id": cfg.passage_marker,
        "query_token": "[Q]",
        "doc_token": "[D]",
        "dim": cfg.dim,
        "similarity": "cosine",
        "query_maxlen": cfg.query_length,
        "doc_maxlen": cfg.passage_length,
        "mask_punctuation": cfg.skip_punctuation,
        "attend_to_mask_tokens": cfg.attend_to_mask_tokens,
        "interaction": "colbert",
    }
    write_json(folder / layouts.COLBERT_CARD, conventions)


def write_pylate(
    folder: AnyPath,
    cfg: RetrieverConfig,
    params: Params,
    tokenizer: str | os.PathLike[str],
    *,
    like: Mapping[str, Any] | None = None,
) -> None:
    """A retriever for ``pylate.models.ColBERT``: the trunk's directory, and the projection as a Dense module.

    Arguments as in :func:`write_colbert`.
    """
    write_pylate_tensors(folder, cfg, tensors_of(bert.colbert_rows(cfg.bert, importance=cfg.importance), params), like)
    copy_tokenizer(tokenizer, folder)


def write_pylate_tensors(
    folder: AnyPath, cfg: RetrieverConfig, tensors: Sequence[Tensor], like: Mapping[str, Any] | None
) -> None:
    """:func:`write_pylate` without the tokenizer, from tensors under the names of :func:`bert.colbert_rows`."""
    write_json(folder / "config.json", encoder_config.bert_to_hf(cfg.bert, like=like))
    *trunk, projection = _without_importance(folder, tensors)
    write_directory(folder, trunk, SHARD_BYTES)
    dense = folder / "1_Dense"
    dense.mkdir()
    write_file(dense / SINGLE, [projection])
    described = {"in_features": cfg.bert.hidden_size, "out_features": cfg.dim, "bias": False, "use_residual": False}
    write_json(dense / "config.json", described | {"activation_function": IDENTITY})
    modules = [("", "sentence_transformers.models.Transformer"), (dense.name, layouts.PYLATE_DENSE)]
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    write_json(folder / MODULES, listed)
    longest = max(cfg.query_length, cfg.passage_length)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    conventions = {
        "model_type": "ColBERT",
        "similarity_fn_name": "MaxSim",
        "query_prefix": cfg.query_marker,
        "document_prefix": cfg.passage_marker,
        "query_length": cfg.query_length,
        "document_length": cfg.passage_length,
        "attend_to_expansion_tokens": cfg.attend_to_mask_tokens,
        "skiplist_words": list(string.punctuation) if cfg.skip_punctuation else [],
        "do_query_expansion": cfg.augment_queries,
    }
    write_json(folder / layouts.PYLATE_CARD, conventions)


def _without_importance(folder: AnyPath, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The other tensors; that of the importance of query tokens, if there is one, goes into its own file."""
    own = [tensor for tensor in tensors if tensor.name == bert.IMPORTANCE]
    if own:
        write_file(folder / layouts.IMPORTANCE_FILE, own)
    return [tensor for tensor in tensors if tensor.name != bert.IMPORTANCE]


def copy_tokenizer(source: str | os.PathLike[str], folder: AnyPath) -> None:
    """Copies the files of a tokenizer's directory."""
    for file in any_path(source).iterdir():
        if not file.is_dir():
            with file.open("rb") as read, (folder / file.name).open("wb") as write:
                shutil.copyfileobj(read, write)


def tensors_of(rows: Sequence[Row], params: Params, lora: Lora | None = None) -> list[Tensor]:
    """The tensors of a model, in the order of its table, each fetched from the devices when it is written.

    Args:
        rows: the table.
        params: the tree it describes, or one of the same shapes (gradients).
        lora: adapters to merge.
    """
    held = leaves(params)
    tensors = []
    for row in rows:
        leaf = held[row.path]
        shape = row.axes.their_shape(leaf.shape[1:] if row.layered else leaf.shape)
        for layer in range(leaf.shape[0]) if row.layered else range(1):
            read = partial(_fetch, row, leaf, layer, lora)
            tensors.append(Tensor(row.key.format(layer + row.first), np.dtype(leaf.dtype), shape, read))
    return tensors


def _fetch(row: Row, leaf: jax.Array, layer: int, lora: Lora | None) -> np.ndarray:
    """One tensor of theirs from our weight, with its adapter merged if it has one."""
    name = row.path.removeprefix("layers.")
    if row.layered:
        leaf = _layer(leaf, jnp.asarray(layer))
    if lora is not None and name in lora.cfg.targets:
        adapter = lora.tree["layers"][name] if row.layered else lora.tree[name]
        if row.layered:
            adapter = jax.tree.map(lambda x: _layer(x, jnp.asarray(layer)), adapter)
            leaf = merge({"layers": {name: leaf}}, {"layers": {name: adapter}}, lora.cfg)["layers"][name]
        else:
            leaf = merge({name: leaf, "layers": {}}, {name: adapter}, lora.cfg)[name]
    elif lora is not None and name in lora.cfg.whole:
        whole = lora.tree["whole"]
        change = _layer(whole["layers"][name], jnp.asarray(layer)) if row.layered else whole[name]
        leaf = (leaf + change).astype(leaf.dtype)
    return np.asarray(_to_theirs(row.axes, leaf[0] if row.layered else leaf))


@jax.jit
def _layer(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of a stack, as a stack of one."""
    return jax.lax.dynamic_slice_in_dim(leaf, layer, 1, 0)


@partial(jax.jit, static_argnums=0)
def _to_theirs(axes: Axes, leaf: jax.Array) -> jax.Array:
    return axes.to_theirs(leaf)


def _halves(row: Row) -> tuple[Row, Row]:
    """Rows of the two matrices of a projection's adapter in PEFT's files: A [rank, in] and B [out, rank]."""
    (made, read), key = row.axes.theirs, _PEFT + row.key.removesuffix("weight")
    inner, outer = (f"({' '.join(letters)})" for letters in (read, made))
    return (
        Row(f"{row.path}.a", f"{key}lora_A.weight", f"r {inner} -> {' '.join(read)} r"),
        Row(f"{row.path}.b", f"{key}lora_B.weight", f"{outer} r -> r {' '.join(made)}"),
    )


def _first_rows(tensor: Tensor, count: int) -> np.ndarray:
    return tensor.read()[:count]
