"""Where the rows of a batch and the copies of weights lie when several processes share one mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmlr_jax.parallel.sharding import MESH_AXES, batch_sharding


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole, so that every process can read it."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """An array that every process holds, on every device of the mesh."""
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda where: array[where])


def rows_shape(mesh: Mesh, *shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    """An array of a batch as a shape with its place; its first axis are the rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def addressable_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """int64, increasing: which of the `rows` of a batch lie on devices of this process.

    They need not be consecutive (a slice's devices follow its torus, not its hosts), nor this process's alone (where
    ``mesh.tensor`` spans processes, those hold the same rows).
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[where] for where in places]))


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], held_b: np.ndarray, rows: int) -> dict[str, jax.Array]:
    """A batch of `rows` on the mesh, to which each process brings what its devices hold.

    Args:
      batch: arrays of ``len(held_b)`` rows.
      held_b: which rows of the batch those are, from :func:`addressable_rows`.
    """
    at_B = np.full(rows, -1)
    at_B[held_b] = np.arange(len(held_b))

    def place(x_b: np.ndarray) -> jax.Array:
        shape = (rows, *x_b.shape[1:])

        def part(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None
            return x_b[at_B[where[0]]]

        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return {name: place(x_b) for name, x_b in batch.items()}


def local_mesh(mesh: Mesh) -> Mesh:
    """The devices of this process as a mesh; `mesh` itself if they are all of it."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if len(own) == mesh.size:
        return mesh
    shape = (1, len(own), 1)
    return Mesh(np.array(own).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def local_arrays(tree: Any, mesh: Mesh) -> Any:
    """Arrays on `mesh` as this process can compute with them alone, on :func:`local_mesh`.

    With several processes they are whole on every device, and all processes must call this together; with one they
    are the very same arrays.
    """
    own = local_mesh(mesh)
    if own is mesh:
        return tree
    whole = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)

    def one(x: jax.Array) -> jax.Array:
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(own), parts)

    return jax.tree.map(one, whole)
