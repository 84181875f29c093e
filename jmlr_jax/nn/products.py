"""Matrix products: of floats, accumulated in float32, forwards and backwards; of int8, forwards."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def product(spec: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """``einsum(spec, x, y)`` of two arrays of one dtype, accumulated in float32.

    A bfloat16 product whose result is float32 is what the matrix units of CPUs and TPUs make; asked for a bfloat16
    result, XLA widens both sides on a CPU first, at a fifth of the rate. Gradients are such products too: the
    cotangent is rounded to the dtype of x and y before them.

    Args:
        spec: subscripts ``x,y->result`` without ``...``; each letter in two of the three, once in each.
        dtype: of the result; None: that of x.

    >>> x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    >>> product("ab,bc->ac", x, y).dtype, product("ab,bc->ac", x, y, jnp.float32).dtype
    (dtype(bfloat16), dtype('float32'))
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    return _product(spec, dtype.name, x, y)


def contract(x: jax.Array, w: jax.Array, n_in: int) -> jax.Array:
    """The last `n_in` axes of x with the first `n_in` of w, by :func:`product`."""
    mine = LETTERS[: x.ndim]
    own = LETTERS[x.ndim - n_in : x.ndim - n_in + w.ndim]
    return product(f"{mine},{own}->{mine[: x.ndim - n_in]}{own[n_in:]}", x, w)


def quantise(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """int8 values and float32 scales whose product is near x: symmetric, a scale for all that differs outside `axes`.

    >>> values, scale = quantise(jnp.array([[1.0, -2.0], [0.0, 0.0]]), (1,))
    >>> values.tolist(), [f"{x:.2f}" for x in (values * scale)[0]]
    ([[64, -127], [0, 0]], ['1.01', '-2.00'])
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


def contract_int8(x: jax.Array, w_int8: jax.Array, scale: jax.Array, n_in: int) -> jax.Array:
    """:func:`contract` with w as :func:`quantise` gives it over its first `n_in` axes, x rounded row by row.

    Sums of the int8 products are exact. There is no gradient.
    """
    own = tuple(range(x.ndim - n_in, x.ndim))
    x_int8, of_row = quantise(x, own)
    sums = jax.lax.dot_general(x_int8, w_int8, ((own, tuple(range(n_in))), ((), ())), preferred_element_type=jnp.int32)
    of_row = of_row.reshape(*x.shape[: x.ndim - n_in], *[1] * (w_int8.ndim - n_in))
    return (sums.astype(jnp.float32) * of_row * scale.reshape(scale.shape[n_in:])).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, dtype: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype)


def _forward(spec: str, dtype: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(spec, dtype, x, y), (x, y)


def _backward(
    spec: str, dtype: str, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (x, y), operands, result = kept, *spec.split("->")
    mine, other = operands.split(",")
    cotangent = cotangent.astype(x.dtype)
    return (
        _product(f"{result},{other}->{mine}", x.dtype.name, cotangent, y),
        _summed_over_rows((mine, x), (result, cotangent), other, y.size),
    )


def _summed_over_rows(one: tuple[str, jax.Array], two: tuple[str, jax.Array], other: str, size: int) -> jax.Array:
    """The gradient of a product's second side, of so many entries.

    Of the two operands a CPU has to turn one: the compiler takes that whose letters come first in what is made. Where
    what is made is smaller than the larger operand, as with adapters, the smaller is turned and then what is made.
    """
    small, large = sorted((one, two), key=lambda side: side[1].size)
    first = [letter for letter in other if letter in small[0]]
    turned = "".join([*first, *(letter for letter in other if letter not in first)])
    if size >= large[1].size or turned == other:
        return _product(f"{one[0]},{two[0]}->{other}", one[1].dtype.name, one[1], two[1])
    made = _product(f"{small[0]},{large[0]}->{turned}", one[1].dtype.name, small[1], large[1])
    # Held back, or the compiler would see through it and turn the large one after all.
    return jnp.transpose(jax.lax.optimization_barrier(made), [turned.index(letter) for letter in other])


_product.defvjp(_forward, _backward)
