"""What bfloat16 brings on this CPU: a decoder of SmolLM2-135M's shape, forwards, and forwards and backwards.

    python benchmarks/narrow.py [--rows 8] [--tokens 256] [--rounds 3]

Random weights, adapters on every projection, in float32 and in bfloat16, in turns; every row is full. Set the
allocator's variables as `tpu_scripts/run.sh` does. CPUs without matrix units (AMX) gain nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jmlr_jax.config_models import LlamaConfig, LoraConfig
from jmlr_jax.nn import lora
from jmlr_jax.nn.functional import init_llama, llama_hidden

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
}
ADAPTERS = LoraConfig(rank=16, alpha=32, targets=("q", "k", "v", "o", "gate", "up", "down"))


def programs(dtype: str, remat: str, rows: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: each a call that begins the work."""
    cfg = LlamaConfig(**SHAPE, dtype=dtype, param_dtype=dtype, remat=remat)
    weights = init_llama(cfg, jax.random.key(0))
    adapters = lora.init_lora(ADAPTERS, cfg, jax.random.key(1))
    tokens_BxT = jax.random.randint(jax.random.key(2), (rows, tokens), 0, SHAPE["vocab_size"])
    length_B = jnp.full((rows,), tokens)

    def loss(adapters: Any, base: Any) -> jax.Array:
        bound = lora.bind(adapters, ADAPTERS, jax.random.key(3))
        return jnp.mean(llama_hidden(base, cfg, tokens_BxT, length_B, adapters=bound).astype(jnp.float32) ** 2)

    forward, both = jax.jit(lambda base: llama_hidden(base, cfg, tokens_BxT, length_B)), jax.jit(jax.grad(loss))
    return {"judge": lambda: forward(weights), "read": lambda: both(adapters, weights)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    made = {
        (dtype, remat): programs(dtype, remat, asked.rows, asked.tokens)
        for dtype in ("float32", "bfloat16")
        for remat in ("none", "attention")
    }
    seconds: dict[str, list[float]] = {}
    for number in range(asked.rounds + 1):  # the first compiles
        for (dtype, remat), calls in made.items():
            for name, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call())
                if number:
                    seconds.setdefault(f"{name}, {dtype}, remat {remat}", []).append(time.perf_counter() - begin)
    print(json.dumps({name: round(median(taken), 3) for name, taken in seconds.items()}, indent=1))


if __name__ == "__main__":
    main()
