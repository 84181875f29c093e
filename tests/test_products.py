"""Products in a narrow dtype: equal to einsum, accumulated in float32 both ways, as the lowered program shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmlr_jax.nn.products import contract, contract_int8, product, quantise

SPECS = {"ab,bc->ac": ((3, 40), (40, 5)), "btgre,bsge->bgrts": ((2, 3, 2, 2, 8), (2, 4, 2, 8))}


def arrays(spec, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, SPECS[spec], strict=True)]


@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_those_of_float32_rounded(spec):
    x, y = arrays(spec, jnp.bfloat16)

    def loss(function):
        return lambda x, y: jnp.sum(jnp.sin(function(x, y).astype(jnp.float32)))

    got = product(spec, x, y), *jax.grad(loss(lambda x, y: product(spec, x, y)), (0, 1))(x, y)
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    want = jnp.einsum(spec, *wide), *jax.grad(loss(lambda x, y: jnp.einsum(spec, x, y)), (0, 1))(*wide)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.03 * float(jnp.abs(other).max()))


def test_every_product_forwards_and_backwards_takes_bfloat16_and_gives_float32():
    x, y = arrays("ab,bc->ac", jnp.bfloat16)
    text = (
        jax.jit(jax.grad(lambda x, y: contract(x, y, 1).astype(jnp.float32).sum() ** 2, (0, 1))).lower(x, y).as_text()
    )
    products = [line.split(" : ")[-1] for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for kinds in products:
        inputs, result = kinds.split("->")
        assert inputs.count("bf16") == 2 and "f32" in result


def test_float32_is_a_plain_einsum():
    x, y = arrays("ab,bc->ac", jnp.float32)
    np.testing.assert_array_equal(product("ab,bc->ac", x, y), jnp.einsum("ab,bc->ac", x, y))


@pytest.mark.parametrize("widths", [(64, 4), (4, 64)])
def test_gradients_turn_the_small_side(widths):
    """On a CPU a product that sums over rows reads one of its operands by columns: a copy, slow where it is large."""
    x, w = jnp.ones((1, 1000, widths[0])) * jnp.arange(widths[0]), jnp.ones(widths) * jnp.arange(widths[1])

    def loss(w, product_of):
        return jnp.sum(jnp.sin(product_of(jnp.sin(x), w)))  # neither side is there in memory beforehand

    ours = jax.jit(jax.grad(lambda w: loss(w, lambda x, w: contract(x, w, 1))))
    np.testing.assert_allclose(ours(w), jax.grad(lambda w: loss(w, jnp.dot))(w), rtol=1e-4, atol=1e-3)
    text = ours.lower(w).compile().as_text()
    assert "f32[64,1000]" not in text


def test_contract_takes_the_last_axes_with_the_first():
    x, w = jnp.ones((2, 3, 4, 5)), jnp.arange(120.0).reshape(4, 5, 6)
    np.testing.assert_allclose(contract(x, w, 2), jnp.tensordot(x, w, 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_products_sum_exactly_what_was_rounded(dtype):
    """Rows and columns of very different sizes: each has its own scale."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = (jax.random.normal(keys[0], (2, 3, 4, 50)) * jnp.array([1e-3, 1.0, 1e3])[:, None, None]).astype(dtype)
    w = jax.random.normal(keys[1], (4, 50, 2, 3)) * jnp.array([[1e-3, 1.0, 1e3], [1.0, 1.0, 5.0]])
    values, scale = quantise(w, (0, 1))
    assert values.dtype == jnp.int8 and scale.shape == (1, 1, 2, 3) and int(jnp.abs(values).max()) == 127
    got = contract_int8(x, values, scale, 2)
    assert got.dtype == dtype and got.shape == (2, 3, 2, 3)

    x_int8, of_row = (np.asarray(part) for part in quantise(x, (2, 3)))
    sums = np.tensordot(x_int8.astype(np.int64), np.asarray(values).astype(np.int64), 2)
    want = sums * of_row * np.asarray(scale).reshape(2, 3)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=1e-5 if dtype == jnp.float32 else 1e-2)
    near = np.tensordot(np.asarray(x, np.float32), np.asarray(w), 2)
    np.testing.assert_allclose(want, near, atol=0.02 * np.abs(near).max(axis=(0, 1, 3), keepdims=True).max())
    relative = np.abs(want - near).max(axis=0) / np.abs(near).max(axis=0)
    assert relative.max() < 0.05, "each row and each column to its own size"


def test_int8_products_are_of_int8():
    x, (values, scale) = jnp.ones((3, 40)), quantise(jnp.ones((40, 5)), (0,))
    text = jax.jit(lambda x: contract_int8(x, values, scale, 1)).lower(x).as_text()
    (kinds,) = [line.split(" : ")[-1] for line in text.splitlines() if "dot_general" in line]
    assert kinds.split("->")[0].count("xi8>") == 2 and "xi32>" in kinds.split("->")[1]
