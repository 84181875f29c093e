"""The three directories a retriever comes in, and what each says about how text becomes tokens.

* ``bert``: a trunk alone, as transformers or sentence-transformers save it. It has no projection.
* ``hf_colbert``: colbert-ai's; trunk and ``linear.weight`` in one file, conventions in ``artifact.metadata``.
* ``pylate``: a trunk's directory with ``modules.json``, the projection in a Dense module's folder, or several without
  an activation between them, conventions in ``config_sentence_transformers.json``; PyLate's, and the
  ``MultiVectorEncoder`` of sentence-transformers 6, which states them there, in ``sentence_bert_config.json`` and with
  the module that masks.

A ModernBERT trunk was trained with FlashAttention, in which tokens that are not attended to come out as nothing. So its
queries had no augmentation unless it was attended to, whatever the directory says (PyLate, issues 109 and 125).
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.files import AnyPath, any_path
from jmlr_jax.hf import bert
from jmlr_jax.hf.gguf_file import is_gguf
from jmlr_jax.hf.io import Entry, HFError, read_directory, read_header, read_json
from jmlr_jax.hf.modules import MASK, NORMALIZE, Modules, projection, read_modules
from jmlr_jax.parallel.distributed import console

IMPORTANCE_FILE = "importance.safetensors"
COLBERT_CARD = "artifact.metadata"
PYLATE_CARD = "config_sentence_transformers.json"
PYLATE_DENSE = "pylate.models.Dense.Dense"
TRANSFORMER_CARD = "sentence_bert_config.json"
MULTI_VECTOR = "MultiVectorEncoder"


@dataclass(frozen=True)
class Source:
    """A retriever's directory as found.

    Attributes:
        entries: tensors of trunk and, if there are, projection and importance of query tokens.
        config: content of config.json.
        conventions: what the directory says of fields of `RetrieverConfig` that a user must not depart from.
        lengths: what it says of its lengths, which are the user's choice.
    """

    kind: Literal["bert", "hf_colbert", "pylate"]
    directory: AnyPath
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    conventions: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def dim(self) -> int | None:
        """Width of the projection; None if the directory has none."""
        entry = self.entries.get(bert.PROJECTION)
        return entry.shape[0] if entry is not None and entry.shape else None

    @property
    def head(self) -> dict[str, bool]:
        """What may follow the trunk, by the names of :func:`jmlr_jax.hf.bert.colbert_rows`, and whether it is there."""
        return {"projection": self.dim is not None, "importance": bert.IMPORTANCE in self.entries}


def open_retriever(directory: str | os.PathLike[str]) -> Source:
    """Recognises the layout of a retriever's directory and reads what it says.

    Raises:
        HFError: no such layout, weights that are not safetensors, or a projection that is more than a linear map.
    """
    folder = any_path(directory)
    check_source(os.fspath(directory))
    modules = read_modules(folder)
    entries, trained = read_directory(folder), {}
    if (folder / IMPORTANCE_FILE).exists():
        entries, trained = entries | read_header(folder / IMPORTANCE_FILE), {"importance": True}
    config = read_json(folder / "config.json")
    if modules is not None:
        if bert.PROJECTION in entries:
            places = ", ".join(place.name for place in modules.dense)
            raise HFError(f"{folder}: {bert.PROJECTION} is set twice, in the trunk's file and in {places}")
        entries = {**entries, bert.PROJECTION: projection(modules.dense)}
        card = _pylate_card(folder, modules)
        skips = folder / PYLATE_CARD if modules.mask is None else modules.mask / "config.json"
        said, lengths = _pylate_conventions(card, skips), _lengths(card, _read(folder / COLBERT_CARD))
        return Source("pylate", folder, entries, config, _as_trained(said, config, folder) | trained, lengths)
    if bert.PROJECTION in entries:
        card = _read(folder / COLBERT_CARD)
        said, lengths = _colbert_conventions(card, folder), _lengths(_read(folder / PYLATE_CARD), card)
        return Source("hf_colbert", folder, entries, config, _as_trained(said, config, folder) | trained, lengths)
    return Source("bert", folder, entries, config, trained)


def check_source(source: str) -> None:
    """Raises HFError if a source of weights is not a directory with a ``config.json``, and says what it is."""
    place = any_path(source)
    if place.is_file():
        kind = "a GGUF file: `jmlr import` makes a directory of it" if is_gguf(place) else "a file"
        raise HFError(f"{source}: is {kind}; expected a Hugging Face directory")
    if not place.is_dir():
        raise HFError(f"{source}: no such directory")
    if not (place / "config.json").exists():
        names = sorted(path.name for path in place.iterdir())
        known = {
            "adapter_config.json": "PEFT adapters; give the directory of the merged model",
            "model_index.json": "a pipeline of diffusers, which is another kind of model",
            "params.json": "weights in their publisher's own layout; give the Hugging Face version",
        }
        what = next((text for name, text in known.items() if name in names), None)
        if what is None and any(name.endswith(".gguf") for name in names):
            what = "GGUF files; `jmlr import FILE DIR` makes a directory of one"
        raise HFError(
            f"{source}: no config.json there" + (f", but {what}" if what else "; expected a Hugging Face model")
        )


def check_conventions(source: Source, cfg: RetrieverConfig) -> None:
    """Raises HFError naming every convention of the directory that the configuration departs from."""
    faults = [
        f"  retriever.{name}={getattr(cfg, name)!r}, the checkpoint was trained with {value!r}"
        for name, value in source.conventions.items()
        if getattr(cfg, name) != value
    ]
    if faults:
        raise HFError("\n".join([f"{source.directory}: the configuration reads text otherwise:", *faults]))


def _as_trained(said: dict[str, Any], config: Mapping[str, Any], folder: AnyPath) -> dict[str, Any]:
    """The conventions with the augmentation that the model really had; one that it did not have is told."""
    if config.get("model_type") != "modernbert" or said["attend_to_mask_tokens"] or not said["augment_queries"]:
        return said
    _tell(
        f"{folder}: queries are not augmented: a ModernBERT whose augmentation is not attended to was trained without"
    )
    return said | {"augment_queries": False}


@cache
def _tell(text: str) -> None:
    """Says it once, however often a command opens the directory."""
    console().print(text)


def _read(file: AnyPath) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return dict(read_json(file)) if file.exists() else {}


def _lengths(pylate: Mapping[str, Any], colbert: Mapping[str, Any]) -> dict[str, int]:
    """Lengths that either card states."""
    found: dict[str, int] = {}
    for said, query, passage in (
        (pylate, "query_length", "document_length"),
        (colbert, "query_maxlen", "doc_maxlen"),
    ):
        pairs = {"query_length": said.get(query), "passage_length": said.get(passage)}
        found |= {name: value for name, value in pairs.items() if value is not None}
    return found


def _colbert_conventions(card: Mapping[str, Any], folder: AnyPath) -> dict[str, Any]:
    """Conventions in artifact.metadata; colbert-ai's own defaults where it is silent."""
    if card.get("similarity", "cosine") != "cosine":
        raise HFError(f"{folder / COLBERT_CARD}: similarity is {card['similarity']!r}; only 'cosine' is computed here")
    return {
        "query_marker": card.get("query_token_id", "[unused0]"),
        "passage_marker": card.get("doc_token_id", "[unused1]"),
        "attend_to_mask_tokens": card.get("attend_to_mask_tokens", False),
        "skip_punctuation": card.get("mask_punctuation", True),
        "augment_queries": True,
    }


def _pylate_conventions(card: Mapping[str, Any], skips: AnyPath) -> dict[str, Any]:
    """Conventions in PyLate's words; its own defaults where they are silent. `skips` is the file of skiplist_words."""
    skipped = card.get("skiplist_words")
    if skipped is not None and sorted(skipped) not in ([], sorted(string.punctuation)):
        raise HFError(f"{skips}: skiplist_words is neither empty nor the ASCII punctuation")
    found = {
        "query_marker": card.get("query_prefix", "[Q] "),
        "passage_marker": card.get("document_prefix", "[D] "),
        "attend_to_mask_tokens": card.get("attend_to_expansion_tokens", False),
        "skip_punctuation": skipped != [],
        "augment_queries": card.get("do_query_expansion", True),
    }
    return {name: value for name, value in found.items() if value is not None}


def _pylate_card(folder: AnyPath, modules: Modules) -> dict[str, Any]:
    """The content of config_sentence_transformers.json in PyLate's words, also where sentence-transformers saved it.

    Raises:
        HFError: a ``MultiVectorEncoder`` that marks, fills up, masks or scores otherwise than is computed here.
    """
    card = _read(folder / PYLATE_CARD)
    if card.get("model_type") != MULTI_VECTOR and (modules.mask is None or "query_prefix" in card):
        return card
    trunk, prompts = _read(folder / TRANSFORMER_CARD), card.get("prompts") or {}
    if modules.mask is None or not modules.normalises:
        raise HFError(f"{folder}: a {MULTI_VECTOR} without {MASK} or {NORMALIZE} is scored otherwise than here")
    mask, expansion = _read(modules.mask / "config.json"), trunk.get("query_expansion") or {}
    faults = [
        f"{name} is {value!r}; only {known[0]!r} is computed here"
        for name, value, known in (
            ("query_expansion.strategy", expansion.get("strategy", "fixed"), ("fixed",)),
            ("query_expansion.token", expansion.get("token"), (None, "[MASK]")),
            ("do_lower_case", trunk.get("do_lower_case", False), (False,)),
            ("skiplist_tasks", mask.get("skiplist_tasks", ["document"]), (["document"],)),
            ("keep_only_token_ids", mask.get("keep_only_token_ids"), (None, [])),
        )
        if value not in known
    ]
    markers = {side: _marker(folder, str(prompts.get(side) or "")) for side in ("query", "document")}
    faults += [
        f"{PYLATE_CARD}: prompts.{side} is {prompts.get(side)!r}; expected one token of the tokenizer, as '[Q] '"
        for side, marker in markers.items()
        if marker is None
    ]
    if faults:
        raise HFError("\n".join(f"{folder}: {fault}" for fault in faults))
    return {
        "query_prefix": markers["query"],
        "document_prefix": markers["document"],
        "query_length": expansion.get("length", trunk.get("query_length")),
        "document_length": trunk.get("document_length"),
        "attend_to_expansion_tokens": expansion.get("attend", False),
        "do_query_expansion": bool(expansion),
        "skiplist_words": mask.get("skiplist_words") or [],
    }


def _marker(folder: AnyPath, text: str) -> str | None:
    """The token that a prompt is; None if it is another text.

    A blank after the token is dropped where words are split at blanks, and is part of the next word elsewhere.
    """
    file = folder / "tokenizer.json"
    said = read_json(file)
    try:
        vocabulary, splits = said["model"]["vocab"], said["model"].get("type") == "WordPiece"
        listed = vocabulary if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
        known = {str(row["content"]) for row in said.get("added_tokens") or ()} | set(listed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HFError(f"{file}: not a tokenizer ({error!r})") from None
    tokens = (text, text.strip()) if splits else (text,)
    return next((token for token in tokens if token and token in known), None)
