"""Rotary positions, and layers of one stack that differ in window and rotation.

A stack of layers is scanned as one program. Where some of its layers see every key and others only a window of them
(Gemma 3, ModernBERT), a flag is scanned along: it chooses between two rotations, and attention hides by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmlr_jax.config_models import BertConfig, LlamaConfig

Rope = tuple[jax.Array, jax.Array]  # cosines and sines, BxTx(E/2) float32


@dataclass(frozen=True)
class Kinds:
    """What the layers of a stack differ in.

    Attributes:
        narrow_L: bool, whether a layer has the window; None where all layers are of one kind, whose rotation is `rope`.
        window: of the layers that have one; None where none has.
        rope: rotation of the layers that see every key.
        narrow_rope: rotation of those that have the window.
    """

    narrow_L: np.ndarray | None
    window: int | None
    rope: Rope
    narrow_rope: Rope

    @classmethod
    def of(cls, cfg: LlamaConfig | BertConfig, position_BxT: jax.Array, length_BxT: jax.Array) -> Kinds:
        """Those of a configuration, for tokens at these positions of rows of these lengths."""
        has = [window is not None for window in cfg.windows]
        rope = narrow = rope_table(cfg, position_BxT, length_BxT)
        if any(has) and cfg.window_rope_theta is not None:
            narrow = rope_table(cfg, position_BxT, length_BxT, narrow=True)
        if all(has) or not any(has):
            return cls(None, cfg.sliding_window if all(has) else None, narrow if all(has) else rope, narrow)
        return cls(np.array(has), cfg.sliding_window, rope, narrow)

    def of_layer(self, narrow: jax.Array | None) -> tuple[Rope, dict[str, Any]]:
        """Rotation of one layer and what :func:`jmlr_jax.nn.attention.attend` is told; `narrow` from `narrow_L`."""
        if narrow is None:
            return self.rope, {"window": self.window}
        cos, sin = (jnp.where(narrow, ours, full) for ours, full in zip(self.narrow_rope, self.rope, strict=True))
        return (cos, sin), {"window": self.window, "narrow": narrow}


def rope_table(
    cfg: LlamaConfig | BertConfig, position_BxT: jax.Array, length_BxT: jax.Array, *, narrow: bool = False
) -> Rope:
    """Cosines and sines BxTx(E/2), float32, of the rotation at each position.

    Scalings follow the published definitions (linear; NTK-aware "dynamic"; Llama 3; YaRN, arXiv 2309.00071).
    "dynamic" depends on the length of the sequence: `length_BxT` says for each token that of its own row, so that a
    row's result does not depend on its neighbours. Keys already in a cache keep the rotation of the length at which
    they were written.

    Args:
        narrow: the rotation of layers with a window where these have their own base, which is not scaled.
    """
    if narrow:
        frequency, magnitude = _plain(cfg.head_width, cfg.window_rope_theta or cfg.rope_theta), 1.0
    else:
        frequency, magnitude = _rope_frequencies(cfg, length_BxT)
    angle = position_BxT.astype(jnp.float32)[:, :, None] * frequency
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def apply_rope(x_BxTxHxE: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (e, e + E/2), the layout of Hugging Face checkpoints; float32 inside, x's dtype outside.

    The partner of each entry comes from a product with a signed permutation, which moves numbers without changing them:
    a TPU moves half a vector over its lanes at several times the cost.
    """
    half = x_BxTxHxE.shape[-1] // 2
    eye, none = np.eye(half), np.zeros((half, half))
    swap_ExE = jnp.asarray(np.block([[none, eye], [-eye, none]]), x_BxTxHxE.dtype)
    partner = jnp.einsum("bthe,ef->bthf", x_BxTxHxE, swap_ExE, precision="highest", preferred_element_type=jnp.float32)
    cos, sin = (jnp.concatenate([table, table], axis=-1)[:, :, None] for table in (cos, sin))
    return (x_BxTxHxE.astype(jnp.float32) * cos + partner * sin).astype(x_BxTxHxE.dtype)


def _exponent(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _plain(width: int, theta: float) -> np.ndarray:
    """Radians per position of each pair (E/2,), nothing scaled."""
    return (1.0 / theta ** _exponent(width)).astype(np.float32)


def _rope_frequencies(cfg: LlamaConfig | BertConfig, length_BxT: jax.Array) -> tuple[Any, float]:
    """Radians per position, (E/2,) or (B, T, E/2), and the factor on cosines and sines."""
    E, scaling = cfg.head_width, cfg.rope_scaling
    plain = _plain(E, cfg.rope_theta)
    if scaling is None:
        return plain, 1.0
    trained = scaling.original_max_positions or cfg.max_positions
    if scaling.type == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.type == "dynamic":
        length = jnp.maximum(length_BxT, trained).astype(jnp.float32)
        stretch = scaling.factor * length / trained - (scaling.factor - 1)
        theta = cfg.rope_theta * stretch ** (E / (E - 2))
        return 1.0 / theta[:, :, None] ** _exponent(E), 1.0
    if scaling.type == "llama3":
        turns = trained * plain / (2 * np.pi)  # full rotations within the length of pre-training
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow, scaled; 1: fast, left alone
        return (plain * (kept + (1 - kept) / scaling.factor)).astype(np.float32), 1.0

    def pair_with(rotations: float) -> float:
        """Index of the pair that turns this often within the length of pre-training."""
        return E * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), E - 1)
    ramp = np.clip((np.arange(E // 2) - first) / max(last - first, 0.001), 0, 1)
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return (plain * (1 - ramp) + plain / scaling.factor * ramp).astype(np.float32), magnitude
