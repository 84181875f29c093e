"""``jmlr import``: a published checkpoint, checked and in the one form that is used here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from jmlr_jax.config_models import BertConfig, DType, LlamaConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.files import any_path
from jmlr_jax.hf import bert, config, llama
from jmlr_jax.hf.export import SHARD_BYTES, write_colbert_tensors
from jmlr_jax.hf.gguf import open_gguf
from jmlr_jax.hf.gguf_file import is_gguf
from jmlr_jax.hf.io import (
    Entry,
    HFError,
    Tensor,
    read_directory,
    read_json,
    whole_directory,
    write_directory,
    write_json,
)
from jmlr_jax.hf.layouts import open_retriever
from jmlr_jax.hf.load import check_position_ids, without_tied_head
from jmlr_jax.hf.table import Row, assign, expected, gather, leaves
from jmlr_jax.nn.functional import abstract_params
from jmlr_jax.parallel.progress import Stage

GENERATION = "generation_config.json"


def import_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: DType | None = None,
    vocab_multiple: int = 1,
    add_tokens: Sequence[str] = (),
) -> None:
    """Checks a published checkpoint against all that training needs, and writes it in the one form that is used here.

    One tensor is in memory at a time. `dst` is a Hugging Face directory again: a decoder of its own class, a retriever
    with a projection as HF_ColBERT, one without as BertModel; ``generator.source`` or ``retriever.source`` of a
    configuration. Pre-training heads, poolers and derived tensors are left out.

    Args:
        src: a Hugging Face directory with safetensors and a fast tokenizer, or a GGUF file with a whole decoder, which
            is dequantised.
        dst: a new directory.
        dtype: of the stored weights; None keeps the checkpoint's (the widest of several), float32 of quantised ones.
        vocab_multiple: rows are added to the vocabulary up to a multiple of this, so that a mesh divides it.
        add_tokens: special tokens added to the tokenizer, e.g. markers. Their rows are the mean of the others, as are
            the rows that only fill up.

    Raises:
        HFError: names every field, tensor or file that does not fit, and every tensor that is not finite in `dtype`.
        TokenizerError: no fast tokenizer.
    """
    model, tokenizer = _published(src)
    raw = model.raw
    known = set(tokenizer.get_vocab())
    if doubled := [token for token in add_tokens if token in known]:
        raise HFError(f"{os.fspath(src)}: the tokenizer has {', '.join(doubled)} already")
    first_new = len(tokenizer)
    tokenizer.add_tokens(list(add_tokens), special_tokens=True)
    least = max(model.shape.vocab_size, len(tokenizer))
    rows = -(-least // vocab_multiple) * vocab_multiple
    fresh = np.zeros(rows, bool)
    fresh[model.shape.vocab_size :] = True
    fresh[first_new : len(tokenizer)] = True

    stored = dtype or model.widest()
    broken: list[str] = []
    listed = model.tensors()
    stage = Stage(f"importing {os.path.basename(os.fspath(src))}", len(listed), "tensors", brief=True)

    def read(number: int, key: str, entry: Entry, grown: np.ndarray | None) -> np.ndarray:
        stage.update(number)
        return _read(key, entry, stored, grown, broken)

    tensors = [
        Tensor(key, np.dtype(stored), (rows, *shape[1:]) if grows else shape, partial(read, number, key, entry, grown))
        for number, (key, shape, entry, grows) in enumerate(listed, 1)
        for grown in (fresh if grows else None,)
    ]
    shape = model.shape.model_copy(update={"vocab_size": rows, "param_dtype": stored})
    with whole_directory(dst) as folder, stage:
        if isinstance(shape, LlamaConfig):
            write_json(folder / "config.json", config.llama_to_hf(shape, raw))
            write_directory(folder, tensors, SHARD_BYTES)
            if model.generation is not None:
                write_json(folder / GENERATION, model.generation)
        elif model.conventions is not None:
            retriever = RetrieverConfig(bert=shape, **model.conventions)
            write_colbert_tensors(folder, retriever, tensors, raw)
        else:
            write_json(folder / "config.json", config.bert_to_hf(shape, "BertModel", raw))
            write_directory(folder, tensors, SHARD_BYTES)
        if broken:
            raise HFError(f"{os.fspath(src)}: not all values are finite as {stored} in {', '.join(gather(broken))}")
        tokenizer.save_pretrained(os.fspath(folder))


@dataclass(frozen=True)
class _Checkpoint:
    """A checked checkpoint: its config.json, its shape, its table, the entries of each weight."""

    raw: Mapping[str, Any]
    shape: LlamaConfig | BertConfig
    rows: Sequence[Row]
    assigned: Mapping[str, list[Entry]]
    wanted: Mapping[str, Any]
    conventions: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None  # content of generation_config.json

    def widest(self) -> DType:
        """The narrowest dtype that holds every tensor exactly."""
        found = {entry.dtype for entries in self.assigned.values() for entry in entries}
        names: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16"}
        return names.get(next(iter(found)), "float32") if len(found) == 1 else "float32"

    def tensors(self) -> list[tuple[str, tuple[int, ...], Entry, bool]]:
        """(key, shape, where it is, whether its first axis is the vocabulary), in the order of the table."""
        vocabulary = {row.path for row in self.rows if row.has_vocabulary}
        return [
            (key, shape, self.assigned[path][layer], path in vocabulary)
            for key, (path, layer, shape) in expected(self.rows, self.wanted).items()
        ]


def _published(src: str | os.PathLike[str]) -> tuple[_Checkpoint, PreTrainedTokenizerFast]:
    """What is at `src`, a directory or a GGUF file."""
    where, source = os.fspath(src), any_path(src)
    if source.is_file():
        opened = open_gguf(src)
        return _decoder(where, opened.config, opened.entries, opened.generation_config), opened.tokenizer
    if source.is_dir() and not (source / "config.json").exists():
        if files := sorted(path.name for path in source.iterdir() if is_gguf(path)):
            raise HFError(f"{where}: no config.json there, but GGUF files: give one of them, {', '.join(files)}")
    raw = read_json(source / "config.json")
    if (raw.get("architectures") or [""])[0] in config.DECODERS:
        said = source / GENERATION
        model = _decoder(where, raw, read_directory(src), read_json(said) if said.exists() else None)
    else:
        model = _encoder(src, raw)
    return model, load_tokenizer(where)


def _decoder(
    where: str, raw: Mapping[str, Any], entries: Mapping[str, Entry], generation: Mapping[str, Any] | None
) -> _Checkpoint:
    shape = config.llama_from_hf(raw, f"{where}/config.json")
    if shape.tie_embeddings:
        entries = without_tied_head(entries, where)
    rows, wanted = llama.llama_rows(shape), leaves(abstract_params(shape))
    assigned = assign(rows, wanted, entries, llama.canonical, where)
    return _Checkpoint(raw, shape, rows, assigned, wanted, generation=generation)


def _encoder(src: str | os.PathLike[str], raw: Mapping[str, Any]) -> _Checkpoint:
    where = os.fspath(src)
    opened = open_retriever(src)
    shape = config.bert_from_hf(opened.config, f"{where}/config.json")
    check_position_ids(opened)
    wanted = leaves(abstract_params(RetrieverConfig(bert=shape, dim=opened.dim or 1)))
    rows = bert.colbert_rows(shape)
    conventions: dict[str, Any] | None = {"dim": opened.dim, **opened.conventions, **opened.lengths}
    if opened.dim is None:
        rows, conventions = rows[:-1], None
        wanted.pop("projection")
    assigned = assign(rows, wanted, opened.entries, bert.canonical, where)
    return _Checkpoint(raw, shape, rows, assigned, wanted, conventions)


def _read(key: str, entry: Entry, dtype: DType, fresh: np.ndarray | None, broken: list[str]) -> np.ndarray:
    """A tensor in `dtype`, rows of the vocabulary added; notes its key in `broken` if it is not finite."""
    array = entry.read()
    if fresh is not None and fresh.any():
        old = array[: len(fresh)][~fresh[: len(array)]]
        grown = np.empty((len(fresh), *array.shape[1:]), array.dtype)
        grown[~fresh] = old
        grown[fresh] = np.mean(old, axis=0, dtype=np.float32).astype(array.dtype)
        array = grown
    with np.errstate(over="ignore"):
        array = np.asarray(array).astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(array).all():
        broken.append(key)
    return array
