"""The modules of a sentence-transformers directory: the trunk, what projects its tokens, what masks and normalises.

Modules are known by the name of their class: the libraries have moved their files several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from jmlr_jax.files import AnyPath
from jmlr_jax.hf import bert
from jmlr_jax.hf.io import SINGLE, Entry, HFError, read_header, read_json

MODULES = "modules.json"
IDENTITY = "torch.nn.modules.linear.Identity"
MASK, NORMALIZE = "MultiVectorMask", "Normalize"
_LIBRARIES = ("sentence_transformers", "pylate")
_POOLED = (("Pooling",), ("Pooling", NORMALIZE))  # not read: late interaction takes the token vectors
_AFTER = ((), (NORMALIZE,), (MASK,), (MASK, NORMALIZE), (NORMALIZE, MASK))
_DENSE = {  # fields of its config.json that must be so
    "bias": False,
    "activation_function": IDENTITY,
    "module_input_name": "token_embeddings",
    "module_output_name": "token_embeddings",
}
_BESIDE = "residual.weight"


@dataclass(frozen=True)
class Modules:
    """What follows the trunk: folders of Dense modules in order, and of the one that masks; whether one normalises."""

    dense: tuple[AnyPath, ...]
    mask: AnyPath | None
    normalises: bool


def read_modules(folder: AnyPath) -> Modules | None:
    """What modules.json lists after the trunk; None of a trunk alone, or of one whose tokens are pooled.

    Raises:
        HFError: a module of another kind or library, in another order, or outside the directory.
    """
    if not (folder / MODULES).exists():
        return None
    listed = read_json(folder / MODULES, kind=list)
    if not all(isinstance(row, dict) for row in listed):
        raise HFError(f"{folder / MODULES}: expected a list of modules, each an object with type and path")
    types = [str(row.get("type")) for row in listed]
    kinds = tuple(name.rpartition(".")[2] if name.partition(".")[0] in _LIBRARIES else "" for name in types)
    trunk, dense = kinds[:1], kinds.count("Dense")
    if trunk == ("Transformer",) and kinds[1:] in ((), *_POOLED):
        return None
    late = dense > 0 and kinds[1 : 1 + dense] == ("Dense",) * dense and kinds[1 + dense :] in _AFTER
    if trunk != ("Transformer",) or listed[0].get("path") or not late:
        raise HFError(
            f"{folder / MODULES}: modules are {', '.join(types)}; a retriever is a Transformer and Dense modules after "
            f"it, with or without {MASK} and {NORMALIZE}, or Pooling with or without {NORMALIZE}, of the libraries "
            f"{' and '.join(_LIBRARIES)}, the Transformer in the directory itself"
        )
    places: dict[str, list[AnyPath]] = {"Dense": [], MASK: [], NORMALIZE: []}
    for kind, row in zip(kinds[1:], listed[1:], strict=True):
        path = str(row.get("path"))
        if PurePosixPath(path).name != path:
            raise HFError(f"{folder / MODULES}: the {kind} module is at {path}, outside the directory")
        places[kind].append(folder / path)
    return Modules(tuple(places["Dense"]), (places[MASK] or [None])[0], NORMALIZE in kinds)


@dataclass(frozen=True)
class _Folded(Entry):
    """Linear maps one after the other, as the one that they are together; `dtype` is F32."""

    maps: tuple[tuple[Entry, Entry | None, bool], ...] = ()  # (weight, weight beside it, whether its input is added)

    def read(self) -> np.ndarray:
        """Their product, float32."""
        whole: np.ndarray | None = None
        for weight, beside, added in self.maps:
            one = np.asarray(weight.read(), np.float64)
            if beside is not None:
                one = one + np.asarray(beside.read(), np.float64)
            elif added:
                one = one + np.eye(len(one))
            whole = one if whole is None else one @ whole
        assert whole is not None
        return whole.astype(np.float32)


def projection(folders: Sequence[AnyPath]) -> Entry:
    """What Dense modules are together: the one matrix there is, or the product of several.

    Raises:
        HFError: a module that is more than a linear map, or does not fit the one before it.
    """
    maps = [_dense(folder) for folder in folders]
    for (before, *_), (after, *_), folder in zip(maps, maps[1:], folders[1:], strict=False):
        if after.shape[1] != before.shape[0]:
            raise HFError(f"{folder}: reads {after.shape[1]} numbers a token where {before.shape[0]} are given")
    weight, beside, added = maps[0]
    if len(maps) == 1 and beside is None and not added:
        return weight
    shape = maps[-1][0].shape[0], weight.shape[1]
    return _Folded(weight.file, "F32", shape, 0, 4 * shape[0] * shape[1], tuple(maps))


def _dense(folder: AnyPath) -> tuple[Entry, Entry | None, bool]:
    """Weight of a Dense module, the weight beside it if there is one, and whether it adds its input."""
    config: dict[str, Any] = read_json(folder / "config.json")
    faults = [
        f"{name} is {config[name]!r}; only {value!r} is computed here"
        for name, value in _DENSE.items()
        if config.get(name) not in (None, value)
    ]
    if faults:
        raise HFError(f"{folder / 'config.json'}: {'; '.join(faults)}")
    if not (folder / SINGLE).exists():
        raise HFError(f"{folder}: no {SINGLE}; save the model again with safetensors")
    entries, added = read_header(folder / SINGLE), bool(config.get("use_residual"))
    weight = entries.get(bert.PROJECTION)
    wanted = {bert.PROJECTION}
    if added and weight is not None and len(set(weight.shape)) > 1:
        wanted.add(_BESIDE)
    if weight is None or set(entries) != wanted:
        alone = f"{bert.PROJECTION} alone" if len(wanted) == 1 else " and ".join(sorted(wanted))
        raise HFError(f"{folder / SINGLE}: holds {', '.join(sorted(entries))}; expected {alone}")
    if any(len(entry.shape) != 2 or entry.shape != weight.shape for entry in entries.values()):
        raise HFError(f"{folder / SINGLE}: {', '.join(sorted(entries))} are not matrices of one shape")
    return weight, entries.get(_BESIDE), added
