"""Key tables: which tensor of a checkpoint is which of our weights, and how its axes lie there.

A row says both directions at once. ``Row("layers.q", "model.layers.{}.self_attn.q_proj.weight", "(h e) d -> d h e")``
reads: their matrix [heads x head width, embed] is our [embed, heads, head width]; ``{}`` is the layer, which ours
stacks on a leading axis. The letter ``v`` is the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jmlr_jax.hf.io import FLOATS, Entry, HFError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Axes:
    """How the axes of their tensor become ours, e.g. ``(h e) d -> d h e``."""

    text: str

    @cached_property
    def ours(self) -> tuple[str, ...]:
        """Letters of our axes, the layer's aside."""
        return tuple(self.text.partition("->")[2].split())

    @cached_property
    def theirs(self) -> tuple[tuple[str, ...], ...]:
        """Letters of each of their axes."""
        groups = re.findall(r"\([^)]*\)|\w+", self.text.partition("->")[0])
        return tuple(tuple(group.strip("()").split()) for group in groups)

    def their_shape(self, shape: Shape) -> Shape:
        """Shape of their tensor, from our shape without the layer axis."""
        size = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(size[letter] for letter in group) for group in self.theirs)

    def to_ours(self, x: Any, shape: Shape) -> Any:
        """Their tensor as ours, of `shape` without the layer axis; NumPy or JAX arrays."""
        size = dict(zip(self.ours, shape, strict=True))
        flat = [letter for group in self.theirs for letter in group]
        return x.reshape([size[letter] for letter in flat]).transpose([flat.index(letter) for letter in self.ours])

    def to_theirs(self, x: Any) -> Any:
        """Our weight, without the layer axis, as theirs; the inverse of :meth:`to_ours`."""
        flat = [letter for group in self.theirs for letter in group]
        return x.transpose([self.ours.index(letter) for letter in flat]).reshape(self.their_shape(x.shape))


@dataclass(frozen=True)
class Row:
    """One weight of ours and its tensors there."""

    path: str
    key: str
    text: str
    first: int = 0  # the layer that the first of our stack is

    @property
    def layered(self) -> bool:
        """Whether there is one tensor a layer."""
        return "{}" in self.key

    @property
    def axes(self) -> Axes:
        """How the axes correspond."""
        return Axes(self.text)

    @property
    def has_vocabulary(self) -> bool:
        """Whether their first axis is the vocabulary."""
        return self.axes.theirs[0] == ("v",)


def leaves(tree: Any) -> dict[str, Any]:
    """Dotted path of each leaf of a nested dict, e.g. ``layers.q``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            {f"{name}.{key}": leaf for key, leaf in leaves(value).items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def expected(rows: Sequence[Row], abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[str, int, Shape]]:
    """Every key that a checkpoint of this model has: (path of ours, layer or 0, their shape).

    Args:
        rows: the table.
        abstract: leaves of our parameters, by dotted path.

    Raises:
        ValueError: a leaf without a row, a row without a leaf, two rows for one leaf or one key: a fault of the table.
    """
    paths = [row.path for row in rows]
    if sorted(paths) != sorted(abstract):
        raise ValueError(f"key table and parameters differ: {sorted(set(paths) ^ set(abstract)) or sorted(paths)}")
    keys: dict[str, tuple[str, int, Shape]] = {}
    for row in rows:
        shape = abstract[row.path].shape
        for layer in range(shape[0]) if row.layered else range(1):
            key = row.key.format(layer + row.first)
            if key in keys:
                raise ValueError(f"key table: {key} stands for {keys[key][0]} and for {row.path}")
            keys[key] = (row.path, layer, row.axes.their_shape(shape[1:] if row.layered else shape))
    return keys


def assign(
    rows: Sequence[Row],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    entries: Mapping[str, Entry],
    canonical: Callable[[str], str | None],
    where: str,
) -> dict[str, list[Entry]]:
    """Finds the tensors of each of our weights, every tensor used or named.

    Args:
        rows: the table.
        abstract: leaves of our parameters by dotted path, with the checkpoint's own vocabulary.
        entries: what the checkpoint holds.
        canonical: the table's name of a key, or None for a tensor that is known and not needed.
        where: the checkpoint, for errors.

    Returns:
        By path: one entry, or one for each layer.

    Raises:
        HFError: names every unknown, missing, doubly set, wrongly shaped or non-float tensor at once.
    """
    wanted = expected(rows, abstract)
    named: dict[str, Entry] = {}
    said: dict[str, str] = {}
    faults: dict[str, list[str]] = defaultdict(list)
    for key, entry in entries.items():
        name = canonical(key)
        if name is None:
            continue
        if name in named:
            faults["set twice"].append(f"{name} (by {said[name]} and {key})")
        elif name not in wanted:
            faults["unknown"].append(key)
        named[name], said[name] = entry, key
    found: dict[str, dict[int, Entry]] = defaultdict(dict)
    for name, (path, layer, shape) in wanted.items():
        if name not in named:
            faults["missing"].append(name)
            continue
        entry = found[path][layer] = named[name]
        if entry.shape != shape:
            faults[f"of shape {list(entry.shape)} where config.json asks for {list(shape)}"].append(said[name])
        elif entry.dtype not in FLOATS:
            faults[f"of dtype {entry.dtype}, which is none of {', '.join(FLOATS)}"].append(said[name])
    if faults:
        lines = [f"  {fault}: {', '.join(gather(keys))}" for fault, keys in faults.items()]
        raise HFError("\n".join([f"{where}: tensors do not fit the model that its config.json describes:", *lines]))
    return {path: [by_layer[layer] for layer in sorted(by_layer)] for path, by_layer in found.items()}


def gather(keys: Iterable[str]) -> list[str]:
    """Keys that differ in the layer alone as one, e.g. ``layers.{0-3,7}.weight``; the others as they are."""
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    names = []
    for key in keys:
        parts = re.fullmatch(r"(.*?\.)(\d+)(\..*)", key)
        if parts is None:
            names.append(key)
        else:
            layers[parts[1], parts[3]].append(int(parts[2]))
    for (before, after), numbers in layers.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
        names.append(f"{before}{texts[0] if len(numbers) == 1 else '{' + ','.join(texts) + '}'}{after}")
    return names
