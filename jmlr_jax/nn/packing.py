"""Rows of different lengths computed end to end: what works on each token alone meets no padding.

Attention sees the rows as they were, padded on the right, so that it needs no masks of its own and every kernel serves
it; all else, nearly all the work of short rows, is done for F places that hold the real tokens one after another. On
a mesh each of the G devices that share the rows packs its own, so that no token travels.

Letters besides the project's: G groups of rows, F places of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jmlr_jax.parallel.sharding import row_groups

MULTIPLE = 16  # numbers of places are multiples of this, as the tiles of matrix units want


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Where tokens of rows B x T stand when those of a group are put end to end.

    Attributes:
        source_GxF: int32, place in the group's rows (row times T and position) of what a packed place holds.
        filled_GxF: bool, whether it holds anything.
        target_GxW: int32, for every place of the rows, W of a group, the packed place of its token.
        real_GxW: bool, whether there is a token at that place.
        shape: (B, T).
    """

    source_GxF: jax.Array
    filled_GxF: jax.Array
    target_GxW: jax.Array
    real_GxW: jax.Array
    shape: tuple[int, int] = field(metadata={"static": True})

    @classmethod
    def of(cls, length_B: jax.Array, width: int, places: int) -> Packing:
        """The packing of rows of `width` whose first `length_B` tokens are real.

        Args:
            places: F; the caller sees to it that no group has more tokens (:func:`fullest`).
        """
        B, G = length_B.shape[0], row_groups()
        length_GxR = length_B.reshape(G, B // G)
        end_GxR = jnp.cumsum(length_GxR, axis=1)
        first_GxR = end_GxR - length_GxR
        place_F, position_T = jnp.arange(places), jnp.arange(width)
        row_GxF = jnp.sum(place_F[None, :, None] >= end_GxR[:, None, :], axis=2)
        filled_GxF = row_GxF < B // G
        row_GxF = jnp.where(filled_GxF, row_GxF, 0)
        source_GxF = row_GxF * width + place_F - jnp.take_along_axis(first_GxR, row_GxF, axis=1)
        real_GxRxT = position_T < length_GxR[:, :, None]
        target_GxRxT = jnp.where(real_GxRxT, first_GxR[:, :, None] + position_T, 0)
        source_GxF = jnp.where(filled_GxF, source_GxF, 0)
        return cls(source_GxF, filled_GxF, target_GxRxT.reshape(G, -1), real_GxRxT.reshape(G, -1), (B, width))

    def pack(self, x_BxTx: jax.Array) -> jax.Array:
        """B x T x ... to G x F x ...; zero where a place is not filled."""
        x_GxWx = x_BxTx.reshape(*self.real_GxW.shape, *x_BxTx.shape[2:])
        return _moved(x_GxWx, (self.source_GxF, self.filled_GxF), (self.target_GxW, self.real_GxW))

    def unpack(self, x_GxFx: jax.Array) -> jax.Array:
        """G x F x ... to B x T x ...; zero at padding."""
        x_GxWx = _moved(x_GxFx, (self.target_GxW, self.real_GxW), (self.source_GxF, self.filled_GxF))
        return x_GxWx.reshape(*self.shape, *x_GxFx.shape[2:])

    def number_GxF(self) -> jax.Array:
        """int32, place of each token in all rows, row times T and position: what dropout hashes."""
        G, W = self.real_GxW.shape
        return self.source_GxF + jnp.arange(G)[:, None] * W


def fullest(length_B: jax.Array) -> jax.Array:
    """int32: tokens of the group that has the most, the least F that will do."""
    return jnp.max(jnp.sum(length_B.reshape(row_groups(), -1), axis=1))


def sizes(fractions: tuple[float, ...], whole: int) -> list[int]:
    """The numbers of places to choose from, ascending: these fractions of `whole`, which itself packs nothing."""
    rounded = {math.ceil(fraction * whole / MULTIPLE) * MULTIPLE for fraction in fractions}
    return sorted(size for size in rounded if size < whole)


def in_fewest_places(
    compute: Callable[[int | None], Any], fractions: tuple[float, ...], length_B: jax.Array, width: int
) -> Any:
    """What ``compute(places)`` gives for the fewest places that hold the real tokens.

    The choice is made by the lengths while the program runs; each number that it chooses from is a branch of its own,
    so that no lengths are too long.

    Args:
        compute: gives the same arrays, to rounding, for every number of places and for None, which packs nothing.
        fractions: of ``B x width`` to choose from; above the largest nothing is packed.
        length_B: real tokens of the rows.
    """
    choices = sizes(fractions, length_B.shape[0] // row_groups() * width)
    if not choices:
        return compute(None)
    choice = jnp.sum(jnp.array(choices) < fullest(length_B))
    return jax.lax.switch(choice, [partial(compute, size) for size in (*choices, None)])


def learn_in_fewest_places(
    loss: Callable[[Any, int | None], jax.Array],
    params: Any,
    fractions: tuple[float, ...],
    length_B: jax.Array,
    width: int,
) -> jax.Array:
    """:func:`in_fewest_places` of a scalar ``loss(params, places)`` whose gradient with respect to `params` is wanted.

    The gradient is taken within the branch, together with the loss: a choice that is differentiated as a whole keeps
    what the backward passes of all its branches would need.
    """

    def best(compute: Callable[[Any, int | None], Any], params: Any) -> Any:
        return in_fewest_places(partial(compute, params), fractions, length_B, width)

    @jax.custom_vjp
    def value(params: Any) -> jax.Array:
        found: jax.Array = best(loss, params)
        return found

    def forward(params: Any) -> tuple[jax.Array, Any]:
        found: tuple[jax.Array, Any] = best(jax.value_and_grad(loss), params)
        return found

    def backward(gradients: Any, along: jax.Array) -> tuple[Any]:
        return (jax.tree.map(lambda g: g * along.astype(g.dtype), gradients),)

    value.defvjp(forward, backward)
    return value(params)


Places = tuple[jax.Array, jax.Array]  # G x places: where to read, whether there is anything


def _moved(x: jax.Array, there: Places, back: Places) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return _read(x, there)
    return _both_ways(x, there, back)


def _read(x: jax.Array, where: Places) -> jax.Array:
    at, present = where
    found = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, at)
    return jnp.where(present.reshape(*present.shape, *[1] * (x.ndim - 2)), found, jnp.zeros((), found.dtype))


# Every token has one place on either side, so a gradient moves back by reading too: adding into places is slow.
@jax.custom_vjp
def _both_ways(x: jax.Array, there: Places, back: Places) -> jax.Array:
    return _read(x, there)


def _forward(x: jax.Array, there: Places, back: Places) -> tuple[jax.Array, Places]:
    return _read(x, there), back


def _backward(back: Places, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return _read(gradient, back), None, None


_both_ways.defvjp(_forward, _backward)
