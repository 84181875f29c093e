"""``jmlr import``: a published checkpoint, checked and in the one form that is used here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from jmlr_jax.config_models import BertConfig, DType, LlamaConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import ids_below, load_tokenizer, save_tokenizer
from jmlr_jax.files import any_path
from jmlr_jax.hf import bert, config, encoder_config, llama
from jmlr_jax.hf.export import SHARD_BYTES, write_colbert_tensors, write_pylate_tensors
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
from jmlr_jax.hf.layouts import check_source, open_retriever
from jmlr_jax.hf.load import check_position_ids, decoder_entries
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
    layers: int | None = None,
) -> None:
    """Checks a published checkpoint against all that training needs, and writes it in the one form that is used here.

    One tensor is in memory at a time. `dst` is a Hugging Face directory again: a decoder of its own class, a retriever
    with a projection as HF_ColBERT (as PyLate's where queries are not augmented), one without as its trunk;
    ``generator.source`` or ``retriever.source`` of a configuration. Pre-training heads, poolers, derived tensors and
    what sees images are left out.

    Args:
        src: a Hugging Face directory with safetensors and a fast tokenizer, or a GGUF file with a whole decoder, which
            is dequantised.
        dst: a new directory.
        dtype: of the stored weights; None keeps the checkpoint's (the widest of several), float32 of quantised ones.
        vocab_multiple: rows are added to the vocabulary up to a multiple of this, so that a mesh divides it.
        add_tokens: special tokens added to the tokenizer, e.g. markers. Their rows are the mean of the others, as are
            the rows that only fill up.
        layers: keep the first so many; None keeps all. Of an encoder that was trained for one vector a text, the first
            half give token vectors that rank about as well as those of all (docs/benchmarks.md).

    Raises:
        HFError: names every field, tensor or file that does not fit, and every tensor that is not finite in `dtype`.
        TokenizerError: no fast tokenizer.
    """
    model, tokenizer = _published(src)
    if layers is not None:
        model = model.first_layers(layers, os.fspath(src))
    raw = model.raw
    known = tokenizer.get_vocab()
    if doubled := [token for token in add_tokens if token in known]:
        raise HFError(f"{os.fspath(src)}: the tokenizer has {', '.join(doubled)} already")
    tokenizer.add_tokens(list(add_tokens), special_tokens=True)
    new = sorted(set(tokenizer.get_vocab().values()) - set(known.values()))
    least = max(model.shape.vocab_size, ids_below(tokenizer))
    rows = -(-least // vocab_multiple) * vocab_multiple
    fresh = np.zeros(rows, bool)
    fresh[model.shape.vocab_size :] = True
    fresh[new] = True

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
            # colbert-ai has no form for queries that are not filled up.
            write = write_colbert_tensors if retriever.augment_queries else write_pylate_tensors
            write(folder, retriever, tensors, raw)
        else:
            write_json(folder / "config.json", encoder_config.bert_to_hf(shape, like=raw))
            write_directory(folder, tensors, SHARD_BYTES)
        if broken:
            raise HFError(f"{os.fspath(src)}: not all values are finite as {stored} in {', '.join(gather(broken))}")
        save_tokenizer(tokenizer, os.fspath(src), os.fspath(folder))


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

    def first_layers(self, count: int, where: str) -> _Checkpoint:
        """The same without the layers after the first `count`."""
        if not 0 < count <= self.shape.num_layers:
            raise HFError(f"{where}: there are {self.shape.num_layers} layers; the first {count} cannot be kept")
        layered = {row.path for row in self.rows if row.layered}
        wanted = {
            path: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype) if path in layered else leaf
            for path, leaf in self.wanted.items()
        }
        assigned = {path: found[:count] if path in layered else found for path, found in self.assigned.items()}
        shape = self.shape.model_copy(update={"num_layers": count})
        return replace(self, raw=_shortened(self.raw, count), shape=shape, wanted=wanted, assigned=assigned)

    def tensors(self) -> list[tuple[str, tuple[int, ...], Entry, bool]]:
        """(key, shape, where it is, whether its first axis is the vocabulary), in the order of the table."""
        vocabulary = {row.path for row in self.rows if row.has_vocabulary}
        return [
            (key, shape, self.assigned[path][layer], path in vocabulary)
            for key, (path, layer, shape) in expected(self.rows, self.wanted).items()
        ]


def _shortened(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A config.json of so many layers; that of a decoder within a model that sees images stands in ``text_config``."""
    made = {**raw, "num_hidden_layers": layers} if "num_hidden_layers" in raw else dict(raw)
    if isinstance(kinds := raw.get("layer_types"), list):
        made["layer_types"] = kinds[:layers]
    if isinstance(text := raw.get("text_config"), Mapping):
        made["text_config"] = _shortened(text, layers)
    return made


def _published(src: str | os.PathLike[str]) -> tuple[_Checkpoint, PreTrainedTokenizerFast]:
    """What is at `src`, a directory or a GGUF file."""
    where, source = os.fspath(src), any_path(src)
    if source.is_file():
        opened = open_gguf(src)
        return _decoder(where, opened.config, opened.entries, opened.generation_config), opened.tokenizer
    if source.is_dir() and not (source / "config.json").exists():
        if files := sorted(path.name for path in source.iterdir() if is_gguf(path)):
            raise HFError(f"{where}: no config.json there, but GGUF files: give one of them, {', '.join(files)}")
    check_source(where)
    raw = read_json(source / "config.json")
    first = str((raw.get("architectures") or [""])[0])
    decodes = first in (*config.DECODERS, *config.NESTED)
    if not decodes and (config.is_decoder(raw) or str(raw.get("model_type")) not in encoder_config.ENCODERS):
        named = ", ".join(map(str, raw.get("architectures") or ["none"]))
        kinds = "; ".join(f"{kind} with {', '.join(of)}" for kind, of in encoder_config.ENCODERS.items())
        raise HFError(
            f"{where}/config.json: architectures is {named} (model_type {raw.get('model_type')}); read here are the "
            f"decoders {', '.join([*config.DECODERS, *config.NESTED])} and, as retrievers, model_type {kinds}"
        )
    if decodes:
        said = source / GENERATION
        model = _decoder(where, raw, read_directory(src), read_json(said) if said.exists() else None)
    else:
        model = _encoder(src, raw)
    return model, load_tokenizer(where)


def _decoder(
    where: str, raw: Mapping[str, Any], entries: Mapping[str, Entry], generation: Mapping[str, Any] | None
) -> _Checkpoint:
    shape = config.llama_from_hf(raw, f"{where}/config.json")
    entries = decoder_entries(entries, shape, where)
    rows, wanted = llama.llama_rows(shape), leaves(abstract_params(shape))
    assigned = assign(rows, wanted, entries, llama.canonical, where)
    return _Checkpoint(raw, shape, rows, assigned, wanted, generation=generation)


def _encoder(src: str | os.PathLike[str], raw: Mapping[str, Any]) -> _Checkpoint:
    where = os.fspath(src)
    opened = open_retriever(src)
    shape = encoder_config.bert_from_hf(opened.config, f"{where}/config.json")
    check_position_ids(opened)
    head, rows = opened.head, bert.colbert_rows(shape, **opened.head)
    like = RetrieverConfig(bert=shape, dim=opened.dim or 1, importance=head["importance"], augment_queries=False)
    wanted = {path: leaf for path, leaf in leaves(abstract_params(like)).items() if head.get(path, True)}
    conventions: dict[str, Any] | None = {"dim": opened.dim, **opened.conventions, **opened.lengths}
    if opened.dim is None:
        conventions = None
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
