"""The one attention function; every model here calls it, so a faster kernel is chosen here and nowhere else.

On TPU, causal attention from the first position on (training, judging) runs as splash attention, a Pallas kernel of
JAX that never writes the scores to memory and skips the blocks above the diagonal. Everything else, and every other
platform, is plain XLA. The platform is that of the mesh in use (``jax.set_mesh``), so that a program compiled here for
a TPU elsewhere gets the kernels it will have there. In plain XLA causal attention goes by blocks of queries, each with
the keys that it can see: half of the work, and scores that stay in a processor's cache.

Letters besides the project's: H query heads, G key/value heads (G divides H), E head width, S key slots.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from jmlr_jax.nn.products import product
from jmlr_jax.parallel.sharding import partition_spec

MASKED = -1e30  # finite: a row with no visible key gives a uniform average instead of NaN
SAVED = "attention"  # what the remat policies of nn/layers.py may keep: outputs and log-sum-exp
LANES, LARGEST_BLOCK = 128, 1024
ROWS, LARGEST_COUNT = 128, 8  # without the kernel: queries of a block, unless there were more blocks than this
UNLIMITED = 2**30  # a window that hides nothing


def attend(
    q_BxTxHxE: jax.Array,
    k_BxSxGxE: jax.Array,
    v_BxSxGxE: jax.Array,
    *,
    causal: bool = False,
    position_BxT: jax.Array | None = None,
    key_length_B: jax.Array | None = None,
    window: int | None = None,
    narrow: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads: query head h reads key/value head ``h // (H / G)``.

    Args:
        q_BxTxHxE, k_BxSxGxE, v_BxSxGxE: in the computing dtype.
        causal: query t sees the keys 0..t; S = T. Instead of `position_BxT`, and what the kernels can do.
        position_BxT: position of each query (a leading 1 broadcasts). Key slot s holds position s, and a query sees
            the slots up to its own position. None: every query sees every key.
        key_length_B: slots from this one on are hidden. None: no such limit.
        window: with `causal` or `position_BxT`, slots ``s <= position - window`` are hidden (Mistral); with neither,
            T = S and those more than `window` away on either side (ModernBERT). None: no limit.
        narrow: bool scalar, whether `window` holds at all, for layers of both kinds in one program. None: it does.
        scale: of the scores; None: one over the root of the head width.

    Returns:
        Head outputs BxTxHxE in q's dtype. Scores, mask and softmax are float32.
    """
    B, T, H, E = q_BxTxHxE.shape
    S, G = k_BxSxGxE.shape[1:3]
    scale = E**-0.5 if scale is None else scale
    if causal and key_length_B is None and splash_applies(E):
        kernel = partial(splash, scale=scale)
        if narrow is None:
            return kernel(q_BxTxHxE, k_BxSxGxE, v_BxSxGxE, window)
        kinds = partial(kernel, window=window), partial(kernel, window=None)  # a kernel's mask is fixed: one for each
        return jax.lax.cond(narrow, *kinds, q_BxTxHxE, k_BxSxGxE, v_BxSxGxE)
    hides = partial(_hidden, window=window, narrow=narrow, key_length_B=key_length_B)
    # Heads before length: each product then is one of matrices, a query's heads of one group in the rows of one.
    q = q_BxTxHxE.reshape(B, T, G, H // G, E).transpose(0, 2, 3, 1, 4)
    k, v = jnp.swapaxes(k_BxSxGxE, 1, 2), jnp.swapaxes(v_BxSxGxE, 1, 2)
    side = -(-T // (LARGEST_COUNT * ROWS)) * ROWS if causal else T
    made = []
    for first in range(0, T, side):
        last = min(first + side, T)
        position = jnp.arange(first, last)[None] if causal else position_BxT
        low = max(0, first - window + 1) if causal and window is not None and narrow is None else 0
        high = last if causal else S
        q_part = q[:, :, :, first:last].reshape(B, G, -1, E)
        score = product("bgre,bgse->bgrs", q_part, k[:, :, low:high], jnp.float32) * scale
        score = score.reshape(B, G, H // G, last - first, high - low)
        hidden = hides(jnp.arange(low, high), position)
        weights = jax.nn.softmax(jnp.where(hidden[:, None, None], MASKED, score), axis=-1).astype(q.dtype)
        out = product("bgrs,bgse->bgre", weights.reshape(B, G, -1, high - low), v[:, :, low:high])
        made.append(out.reshape(B, G, H // G, last - first, E))
    out = made[0] if len(made) == 1 else jnp.concatenate(made, axis=3)
    return checkpoint_name(out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E), SAVED)


def _hidden(
    slot_S: jax.Array,
    position_BxT: jax.Array | None,
    *,
    window: int | None,
    narrow: jax.Array | None,
    key_length_B: jax.Array | None,
) -> jax.Array:
    """Which key slots a query does not see, bool BxTxS or with 1 in place of B; arguments as in :func:`attend`."""
    reach = window if window is None or narrow is None else jnp.where(narrow, window, UNLIMITED)
    hidden_BxTxS = jnp.zeros((1, 1, len(slot_S)), bool)
    if position_BxT is not None:
        hidden_BxTxS |= slot_S > position_BxT[:, :, None]
        if reach is not None:
            hidden_BxTxS |= slot_S <= position_BxT[:, :, None] - reach
    elif reach is not None:  # T = S
        hidden_BxTxS |= jnp.abs(slot_S - slot_S[:, None]) > reach
    if key_length_B is not None:
        hidden_BxTxS |= slot_S >= key_length_B[:, None, None]
    return hidden_BxTxS


def splash_applies(head_width: int) -> bool:
    """Whether the program is for a TPU and the heads are as wide as the kernel's registers ask for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return platform == "tpu" and head_width % LANES == 0


def splash(
    q_BxTxHxE: jax.Array,
    k_BxTxGxE: jax.Array,
    v_BxTxGxE: jax.Array,
    window: int | None = None,
    *,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by the Pallas kernel, each device on its own rows and heads; arguments as in :func:`attend`.

    Args:
        interpret: run the kernel's program on any platform, slowly; for tests.
    """
    T, E = q_BxTxHxE.shape[1], q_BxTxHxE.shape[3]
    padded, block = blocks(T)

    def one_device(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        shape = (padded, padded)
        mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
        kernel = kernels.make_splash_mha(
            mask=kernels.MultiHeadMask([mask] * q.shape[1]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=_block_sizes(block),
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v)

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))), 1, 2)

    # The kernel knows no scale; in float32, since 1 / sqrt(128) is not a power of two.
    q = (q_BxTxHxE.astype(jnp.float32) * (E**-0.5 if scale is None else scale)).astype(q_BxTxHxE.dtype)
    if not jax.sharding.get_abstract_mesh().empty:
        heads, groups = (partition_spec(("batch", name, "length", "head_dim"), name) for name in ("heads", "kv_heads"))
        one_device = partial(jax.shard_map, in_specs=(heads, groups, groups), out_specs=heads, check_vma=False)(
            one_device
        )
    out_BxHxTxE = one_device(heads_first(q), heads_first(k_BxTxGxE), heads_first(v_BxTxGxE))
    return jnp.swapaxes(out_BxHxTxE, 1, 2)[:, :T]


def blocks(length: int) -> tuple[int, int]:
    """Padded length and block side for a row of `length` tokens: one block if it fits, else the least padding.

    >>> blocks(640), blocks(2688), blocks(2944), blocks(4096)
    ((640, 640), (2688, 896), (3072, 1024), (4096, 1024))
    """
    whole = -(-length // LANES) * LANES
    if whole <= LARGEST_BLOCK:
        return whole, whole
    sides = range(LARGEST_BLOCK, LARGEST_BLOCK // 2 - 1, -LANES)
    return min(((-(-length // side) * side, side) for side in sides), key=lambda found: found[0])


def visited(length: int, window: int | None = None) -> int:
    """Query-key pairs of one head that the kernel computes for a row: whole blocks, those all hidden left out.

    >>> visited(640), visited(4096) / 4096**2  # one block; ten of sixteen
    (409600, 0.625)
    """
    padded, side = blocks(length)
    count = padded // side
    back = count if window is None else -(-(window - 1) // side)
    return side * side * sum(min(row, back) + 1 for row in range(count))


def _block_sizes(side: int) -> kernels.BlockSizes:
    return kernels.BlockSizes(
        block_q=side,
        block_kv=side,
        block_kv_compute=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_kv_dkv_compute=side,
        use_fused_bwd_kernel=True,
    )
