"""The three directories a retriever comes in, and what each says about how text becomes tokens.

* ``bert``: a BertModel alone, as transformers or sentence-transformers save it. It has no projection.
* ``hf_colbert``: colbert-ai's; trunk and ``linear.weight`` in one file, conventions in ``artifact.metadata``.
* ``pylate``: a BertModel directory with ``modules.json``, the projection in a Dense module's folder, conventions in
  ``config_sentence_transformers.json``.
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from etils import epath

from jmlr_jax.config_models import RetrieverConfig
from jmlr_jax.files import any_path
from jmlr_jax.hf import bert
from jmlr_jax.hf.io import SINGLE, Entry, HFError, read_directory, read_header, read_json

COLBERT_CARD = "artifact.metadata"
MODULES = "modules.json"
PYLATE_CARD = "config_sentence_transformers.json"
PYLATE_DENSE = "pylate.models.Dense.Dense"
IDENTITY = "torch.nn.modules.linear.Identity"
_DENSE_TYPES = (PYLATE_DENSE, "sentence_transformers.models.Dense")


@dataclass(frozen=True)
class Source:
    """A retriever's directory as found.

    Attributes:
        entries: tensors of trunk and, if there is one, projection.
        config: content of config.json.
        conventions: what the directory says of fields of `RetrieverConfig` that a user must not depart from.
        lengths: what it says of its lengths, which are the user's choice.
    """

    kind: Literal["bert", "hf_colbert", "pylate"]
    directory: epath.Path
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    conventions: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def dim(self) -> int | None:
        """Width of the projection; None if the directory has none."""
        entry = self.entries.get(bert.PROJECTION)
        return entry.shape[0] if entry is not None and entry.shape else None


def open_retriever(directory: str | os.PathLike[str]) -> Source:
    """Recognises the layout of a retriever's directory and reads what it says.

    Raises:
        HFError: no such layout, weights that are not safetensors, or a projection that is more than a linear map.
    """
    folder = any_path(directory)
    if not folder.is_dir():
        raise HFError(f"{folder}: no such directory")
    dense = _dense_folder(folder)
    entries = read_directory(folder)
    config = read_json(folder / "config.json")
    if dense is not None:
        if bert.PROJECTION in entries:
            raise HFError(f"{folder}: {bert.PROJECTION} is set twice, in the trunk's file and in {dense.name}")
        entries = {**entries, **_dense_entries(dense)}
        return Source("pylate", folder, entries, config, _pylate_conventions(folder), _lengths(folder))
    if bert.PROJECTION in entries:
        return Source("hf_colbert", folder, entries, config, _colbert_conventions(folder), _lengths(folder))
    return Source("bert", folder, entries, config)


def check_conventions(source: Source, cfg: RetrieverConfig) -> None:
    """Raises HFError naming every convention of the directory that the configuration departs from."""
    faults = [
        f"  retriever.{name}={getattr(cfg, name)!r}, the checkpoint was trained with {value!r}"
        for name, value in source.conventions.items()
        if getattr(cfg, name) != value
    ]
    if faults:
        raise HFError("\n".join([f"{source.directory}: the configuration reads text otherwise:", *faults]))


def _dense_folder(folder: epath.Path) -> epath.Path | None:
    """Folder of the one Dense module that modules.json lists; None if there is none."""
    if not (folder / MODULES).exists():
        return None
    listed = read_json(folder / MODULES, kind=list)
    dense = [row for row in listed if row.get("type") in _DENSE_TYPES]
    if not dense:
        return None
    names = [str(row.get("type")) for row in listed]
    if len(listed) != 2 or listed[0].get("path") or names[1] not in _DENSE_TYPES:
        raise HFError(
            f"{folder / MODULES}: modules are {', '.join(names)}; a retriever is a Transformer and one Dense module"
        )
    path = str(dense[0].get("path"))
    if epath.Path(path).name != path:
        raise HFError(f"{folder / MODULES}: the Dense module is at {path}, outside the directory")
    return folder / path


def _dense_entries(dense: epath.Path) -> dict[str, Entry]:
    config = read_json(dense / "config.json")
    faults = [
        f"{name} is {config[name]!r}; only {value!r} is computed here"
        for name, value in (("bias", False), ("use_residual", False), ("activation_function", IDENTITY))
        if config.get(name, value) != value
    ]
    if faults:
        raise HFError(f"{dense / 'config.json'}: {'; '.join(faults)}")
    if not (dense / SINGLE).exists():
        raise HFError(f"{dense}: no {SINGLE}; save the model again with safetensors")
    entries = read_header(dense / SINGLE)
    if set(entries) != {bert.PROJECTION}:
        raise HFError(f"{dense / SINGLE}: holds {', '.join(sorted(entries))}; expected {bert.PROJECTION} alone")
    return entries


def _lengths(folder: epath.Path) -> dict[str, int]:
    """Lengths that either card states."""
    found: dict[str, int] = {}
    for card, query, passage in (
        (PYLATE_CARD, "query_length", "document_length"),
        (COLBERT_CARD, "query_maxlen", "doc_maxlen"),
    ):
        said = read_json(folder / card) if (folder / card).exists() else {}
        pairs = {"query_length": said.get(query), "passage_length": said.get(passage)}
        found |= {name: value for name, value in pairs.items() if value is not None}
    return found


def _colbert_conventions(folder: epath.Path) -> dict[str, Any]:
    """Conventions in artifact.metadata; colbert-ai's own defaults where it is silent."""
    card = read_json(folder / COLBERT_CARD) if (folder / COLBERT_CARD).exists() else {}
    if card.get("similarity", "cosine") != "cosine":
        raise HFError(f"{folder / COLBERT_CARD}: similarity is {card['similarity']!r}; only 'cosine' is computed here")
    return {
        "query_marker": card.get("query_token_id", "[unused0]"),
        "passage_marker": card.get("doc_token_id", "[unused1]"),
        "attend_to_mask_tokens": card.get("attend_to_mask_tokens", False),
        "skip_punctuation": card.get("mask_punctuation", True),
        "augment_queries": True,
    }


def _pylate_conventions(folder: epath.Path) -> dict[str, Any]:
    """Conventions in config_sentence_transformers.json; PyLate's own defaults where it is silent."""
    card = read_json(folder / PYLATE_CARD) if (folder / PYLATE_CARD).exists() else {}
    skipped = card.get("skiplist_words")
    if skipped is not None and sorted(skipped) not in ([], sorted(string.punctuation)):
        raise HFError(f"{folder / PYLATE_CARD}: skiplist_words is neither empty nor the ASCII punctuation")
    found = {
        "query_marker": card.get("query_prefix", "[Q] "),
        "passage_marker": card.get("document_prefix", "[D] "),
        "attend_to_mask_tokens": card.get("attend_to_expansion_tokens", False),
        "skip_punctuation": skipped != [],
        "augment_queries": card.get("do_query_expansion", True),
    }
    return {name: value for name, value in found.items() if value is not None}
