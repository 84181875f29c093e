"""What the models share: weight rows, initialisers, layer scan, projections with adapters, norms.

Weights are stored [in, out], heads split into their own axes (``q: [embed, heads, head_dim]``, ``o: [heads, head_dim,
embed]``), so that each named axis can be sharded on its own and a projection contracts x's last axes with w's first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jmlr_jax.config_models import Remat
from jmlr_jax.nn import attention
from jmlr_jax.nn.products import contract, contract_int8, quantise
from jmlr_jax.parallel.sharding import gather

Params = dict[str, Any]
Initialiser = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

# ---------------------------------------------------------------------------------------------------------------
# Initialisers: every random start is chosen here.

ones: Initialiser = jax.nn.initializers.ones
zeros: Initialiser = jax.nn.initializers.zeros
embedding: Initialiser = jax.nn.initializers.normal(0.02)
# An encoder norms its input, so the size of its tables sets only how far one update of a given learning rate turns a
# word: at 0.02 fifty updates of 1e-3 replace every word that is met.
words: Initialiser = jax.nn.initializers.normal(0.125)
faint: Initialiser = jax.nn.initializers.normal(0.025)  # positions and types, beside the words


def fan_in(n_in: int, gain: float = 1.0) -> Initialiser:
    """Normal with standard deviation ``gain / sqrt(size of the first n_in axes)``: keeps unit inputs at `gain`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * (gain / math.sqrt(math.prod(shape[:n_in])))

    return init


def residual(n_in: int, num_layers: int) -> Initialiser:
    """:func:`fan_in` for the two projections that add to the residual stream, so that its growth is depth-free."""
    return fan_in(n_in, (2 * num_layers) ** -0.5)


# ---------------------------------------------------------------------------------------------------------------
# Weights and layer stacks


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Initialiser, dtype: str
) -> nnx.Param[jax.Array]:
    """One weight: shape, logical axes (rules in :mod:`jmlr_jax.parallel.sharding`), initialiser and dtype, said once.

    Random numbers are drawn in float32 and rounded to `dtype`, so that a narrower copy starts at the same point.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions but {len(axes)} axis names {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32).astype(dtype), axes=axes)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """`count` independently initialised copies of a module, weights stacked on a leading axis named "layers"."""
    split = nnx.split_rngs(splits=count)
    stacked = split(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=("layers", *node.axes))
    return stacked


# Names under which a layer marks what a backward pass may find kept; attention marks its own outputs.
QKV, MLP = "qkv", "mlp"
KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": (QKV, attention.SAVED),
    "mlp": (MLP,),
    "dots": (QKV, attention.SAVED, MLP),
}


def scan_layers(
    layers: nnx.Module,
    carry: Any,
    inputs: Any,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    remat: Remat,
) -> tuple[Any, Any]:
    """``lax.scan`` of ``body(layer, carry, input)`` over stacked layers and inputs with a leading layer axis.

    Args:
        remat: what the backward pass computes again. "full": everything within a layer; "attention" keeps queries,
            keys, values and outputs of attention, "mlp" the inner products of the network, "dots" both, after which no
            large product is computed twice but that of the output projection; "none" keeps whatever is needed.

    Returns:
        The last carry and the stacked outputs.
    """
    graphdef, state = nnx.split(layers)

    def step(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        return body(nnx.merge(graphdef, layer[0]), carry, layer[1])

    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    return jax.lax.scan(step, carry, (state, inputs))


# ---------------------------------------------------------------------------------------------------------------
# Projections and their adapters

# Projections of the decoder that may carry an adapter, with their logical axes.
AXES = {
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}
TARGETS = (*AXES, "qkv")  # ModernBERT's three in one
# Which input of a layer a projection reads. Adapters of one input share its dropout mask: each sees a mask of the same
# law, and it is drawn once.
INPUTS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3, "lm_head": 4}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters ready for use: the weights of :mod:`jmlr_jax.nn.lora` with what turns them into an update.

    Attributes:
        tree: ``{"layers": {target: {"a", "b"}}, "lm_head": {"a", "b"}}``; inside a layer ``{target: {"a", "b"}}``.
        key: dropout key; None turns dropout off.
        scale: alpha / rank.
        dropout: probability of dropping an input of the adapter.
        place: int, for the leading axes of the inputs, where each would stand if they were not packed
            (:mod:`jmlr_jax.nn.packing`); dropout masks follow it. None: they are not packed.
    """

    tree: Params
    key: jax.Array | None
    scale: float = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})
    place: jax.Array | None = None

    def per_layer(self, num_layers: int) -> tuple[Params, jax.Array | None]:
        """Tree and keys with a leading layer axis, to be scanned and put back with :meth:`at_layer`."""
        keys = None if self.key is None else jax.random.split(self.key, num_layers)
        return self.tree.get("layers", {}), keys

    def at_layer(self, layer: tuple[Params, jax.Array | None]) -> Adapters:
        """The adapters of one layer."""
        return replace(self, tree=layer[0], key=layer[1])

    def update(self, name: str, x: jax.Array, n_in: int) -> jax.Array | float:
        """What the adapter of projection `name` adds to it: ``scale * dropout(x) a b``; 0.0 where there is none."""
        if name not in self.tree:
            return 0.0
        if self.key is not None and self.dropout > 0:
            x = _dropped(x, jax.random.fold_in(self.key, INPUTS[name]), self.dropout, self.place)
        axes = AXES[name]
        a = gather(self.tree[name]["a"].astype(x.dtype), (*axes[:n_in], "rank"))
        b = gather(self.tree[name]["b"].astype(x.dtype), ("rank", *axes[n_in:]))
        return contract(contract(x, a, n_in), b, 1) * self.scale


def _dropped(x: jax.Array, key: jax.Array, rate: float, place: jax.Array | None = None) -> jax.Array:
    """x with entries dropped at `rate`, the others scaled up to keep the mean."""
    kept = _words(key, x.shape, place) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _words(key: jax.Array, shape: tuple[int, ...], place: jax.Array | None) -> jax.Array:
    """A uint32 for every place: a hash of the key and of where the place is, the same on every mesh and packed or not.

    Not JAX's generator, whose twenty rounds a number take as long as the products that the mask is for; this is drawn
    within them. What dropout needs of it (rate, and no relation of rows, columns and keys) is tested.
    """
    first, second, third = jax.random.bits(key, (3,), jnp.uint32)
    known = 0 if place is None else place.ndim  # axes that are numbered already
    row = jnp.zeros(shape[:-1], jnp.uint32)
    if place is not None:
        row += place.astype(jnp.uint32).reshape(*place.shape, *[1] * (len(shape) - 1 - known))
    for axis, size in list(enumerate(shape[:-1]))[known:]:
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape[:-1], axis)
    column = _mixed(jax.lax.iota(jnp.uint32, shape[-1]) ^ first)
    return _mixed(_mixed(_mixed(row ^ second) ^ third)[..., None] + column)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the input flips every bit of the output about half the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def project(
    x: jax.Array,
    w: nnx.Param[jax.Array],
    n_in: int = 1,
    name: str = "",
    adapters: Adapters | None = None,
    int8: bool = False,
) -> jax.Array:
    """Contract the last `n_in` axes of x with the first `n_in` of w in x's dtype, plus the adapter of `name`.

    With `int8` both sides are rounded to int8 first, and nothing has a gradient.
    """
    if int8:
        assert adapters is None
        values, scale = quantise(w[...], tuple(range(n_in)))
        return contract_int8(x, gather(values, w.axes[-values.ndim :]), scale, n_in)
    # Cast before it is gathered: half the bytes travel. Within a stack the names include the layer axis, the value not.
    weight = gather(w[...].astype(x.dtype), w.axes[-w[...].ndim :])
    y = contract(x, weight, n_in)
    return y if adapters is None else y + adapters.update(name, x, n_in)


# ---------------------------------------------------------------------------------------------------------------
# Norms


def rms_norm(x: jax.Array, scale: nnx.Param[jax.Array], eps: float, *, from_one: bool = False) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32, back in x's dtype.

    Args:
        from_one: the factor is ``1 + scale``, as Gemma stores it.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    factor = scale[...].astype(jnp.float32)
    return (x32 * (1 + factor if from_one else factor)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: nnx.Param[jax.Array] | jax.Array, bias: nnx.Param[jax.Array] | None, eps: float
) -> jax.Array:
    """Layer norm over the last axis, in float32, back in x's dtype; without `bias` nothing is added."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    x32 = x32 * scale[...].astype(jnp.float32)
    return (x32 if bias is None else x32 + bias[...].astype(jnp.float32)).astype(x.dtype)
