"""Device mesh, the one table from logical axes to mesh axes, and its errors.

Every weight names its axes logically (``("embed", "heads", "head_dim")``) where it is declared; this file alone
knows where such an axis lives on the mesh. Parameters are sharded over ``fsdp`` and ``tensor``, rows of a batch over
``data`` and ``fsdp``. Mesh axis types are stated as Auto: the compiler places what is not constrained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmlr_jax.config import MeshConfig
from jmlr_jax.errors import JmlrError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # rows of activations
    "batch": ("data", "fsdp"),
    # The encoder is small: its weights stay whole on every `tensor` member, which takes its own share of rows instead.
    "encoder_batch": ("data", "fsdp", "tensor"),
    "length": None,
    "hidden": None,
    # weights
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "rank": None,
    # weights of the encoder; its vocabulary (30,522 in BERT) seldom divides
    "encoder_vocab": None,
    "encoder_heads": None,
    "encoder_mlp": None,
    "parts": None,
    "positions": None,
    "token_types": None,
    "token_vector": None,
}

# Axes that take what no other dimension of their array lies on, if their size divides: half of each adapter has no
# other dimension over `fsdp` and would stand whole on every device, with its moments.
SPARE = {"rank": "fsdp"}


class ShardingError(JmlrError, ValueError):
    """The mesh, a weight and the rule table do not fit together; the message carries the numbers."""


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay the devices out as (data, fsdp, tensor), the second phase of validation.

    Args:
        cfg: axis sizes, one of which may be -1 and takes what the others leave.
        devices: all devices of the program when None.

    Raises:
        ShardingError: two axes are -1, a size is neither positive nor -1, or the sizes do not multiply to the devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (cfg.data, cfg.fsdp, cfg.tensor), strict=True))
    bad = [f"mesh.{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    if bad:
        raise ShardingError(f"{', '.join(bad)}: an axis has a positive size, or -1 to take what the others leave")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ShardingError(f"mesh axes {' and '.join(free)} are both -1; give all but one a size")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    stated = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if len(found) % fixed or (not free and fixed != len(found)):
        raise ShardingError(f"{stated} needs {'a multiple of ' if free else ''}{fixed} devices; {len(found)} are there")
    if free:
        sizes[free[0]] = len(found) // fixed
    shape = tuple(sizes[name] for name in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=found)


def partition_spec(axes: Sequence[str], where: str) -> PartitionSpec:
    """Mesh axes of an array whose dimensions carry the logical names `axes`; `where` names it in errors.

    Raises:
        ShardingError: a name without a rule, or a mesh axis that two dimensions would share.
    """
    entries: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for axis in axes:
        if axis not in RULES:
            raise ShardingError(f"{where}: logical axis {axis!r} has no rule; known are {', '.join(sorted(RULES))}")
        rule = RULES[axis]
        for mesh_axis in _names(rule):
            if mesh_axis in taken:
                raise ShardingError(
                    f"{where}: axes {taken[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}"
                )
            taken[mesh_axis] = axis
        entries.append(rule)
    return PartitionSpec(*entries)


def shardings(mesh: Mesh, logical_tree: Any, abstract_tree: Any) -> Any:
    """Sharding of every array of a tree.

    Args:
        mesh: from :func:`make_mesh`.
        logical_tree: tuples of logical axis names in the structure of `abstract_tree`.
        abstract_tree: arrays or ``ShapeDtypeStruct``.

    Returns:
        A tree of ``NamedSharding``.

    Raises:
        ShardingError: see :func:`partition_spec`; also a name missing for a dimension, or a dimension that its mesh
            axes do not divide.
    """

    def one(path: tuple[Any, ...], leaf: Any, axes: tuple[str, ...]) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        if len(axes) != len(leaf.shape):
            raise ShardingError(f"{where}: {len(axes)} axis names {axes} for shape {tuple(leaf.shape)}")
        spec = partition_spec(axes, where)
        for dim, (size, axis, entry) in enumerate(zip(leaf.shape, axes, spec, strict=True)):
            ways = math.prod(mesh.shape[name] for name in _names(entry))
            if size % ways:
                over = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in _names(entry))
                raise ShardingError(
                    f"{where}: dimension {dim} ({axis!r}) has size {size}, which {over} does not divide; "
                    f"choose mesh sizes that divide {size}"
                )
        return NamedSharding(mesh, _with_spare(spec, axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, abstract_tree, logical_tree)


def _with_spare(spec: PartitionSpec, axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    taken = {name for entry in spec for name in _names(entry)}
    for dim, axis in enumerate(axes):
        free = SPARE.get(axis)
        if free is not None and free not in taken and shape[dim] % mesh.shape[free] == 0:
            return PartitionSpec(*spec[:dim], free, *spec[dim + 1 :])
    return spec


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch array: the leading dimension over (data, fsdp), the others whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_ways(mesh: Mesh) -> int:
    """Over how many groups of devices the rows of a batch are spread."""
    return math.prod(mesh.shape[name] for name in _names(RULES["batch"]))


def check_rows(mesh: Mesh, rows: int, what: str) -> int:
    """Rows each (data, fsdp) position holds; `what` names the setting in the error.

    Raises:
        ShardingError: `rows` does not divide.
    """
    ways = batch_ways(mesh)
    if rows % ways:
        over = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in _names(RULES["batch"]))
        raise ShardingError(f"{what}={rows} is not a multiple of {over} = {ways}")
    return rows // ways


def row_groups() -> int:
    """How many devices share the rows of a batch in the program being traced; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in _names(RULES["batch"]))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pin an activation's layout inside a compiled function; without a mesh (``jax.set_mesh``) it is `x` itself.

    Raises:
        ShardingError: as many names as dimensions are needed, each with a rule.
    """
    if len(axes) != x.ndim:
        raise ShardingError(f"activation of shape {x.shape} constrained with {len(axes)} axis names {axes}")
    spec = partition_spec(axes, f"activation of shape {x.shape}")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def gather(weight: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A weight made whole along ``fsdp`` for the product ahead; its gradient is cut along ``fsdp`` again.

    Said outright because the compiler, left alone, cuts such a product into a ring of partial products, each of which
    reads and writes all the sums: three times the work's time on a TPU v5e. A gather runs beside other work instead.

    Args:
        axes: logical names of its dimensions.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    return _gather(axes, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axes: tuple[str, ...], weight: jax.Array) -> jax.Array:
    spec = partition_spec(axes, f"weight of shape {weight.shape}")
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*(None if e == "fsdp" else e for e in spec)))


def _gather_fwd(axes: tuple[str, ...], weight: jax.Array) -> tuple[jax.Array, None]:
    return _gather(axes, weight), None


def _gather_bwd(axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    spec = partition_spec(axes, f"gradient of shape {gradient.shape}")
    spec = _with_spare(spec, axes, gradient.shape, jax.sharding.get_abstract_mesh())
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def replicated_report(tree: Any, threshold_bytes: int) -> list[tuple[str, int]]:
    """Arrays of at least `threshold_bytes` that every one of several devices holds whole, largest first.

    Returns:
        (path, bytes) pairs; bytes are those of one copy.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        sharding = leaf.sharding
        if size >= threshold_bytes and len(sharding.device_set) > 1 and sharding.is_fully_replicated:
            found.append((jax.tree_util.keystr(path, simple=True, separator="."), size))
    return sorted(found, key=lambda item: (-item[1], item[0]))


def _names(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if rule is None:
        return ()
    return (rule,) if isinstance(rule, str) else rule
