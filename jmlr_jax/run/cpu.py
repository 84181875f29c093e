"""What the CPU at hand computes slowly, told before a run spends hours on it."""

from __future__ import annotations

from pathlib import Path

import jax

from jmlr_jax.config import Config

NARROW = frozenset({"amx_bf16", "avx512_bf16"})  # a CPU without either widens every bfloat16 operand first


def slow_dtype(cfg: Config, flags: frozenset[str] | None = None) -> str | None:
    """A line on bfloat16 where this CPU has no instructions for it; None where there is nothing to say.

    Args:
      flags: of the CPU as Linux names them; None: those of this one. Where they are not known nothing is said.
    """
    if jax.default_backend() != "cpu":
        return None
    have = cpu_flags() if flags is None else flags
    narrow = {"generator.llama": cfg.generator.llama.dtype, "retriever.bert": cfg.retriever.bert.dtype}
    asked = [f"{name}.dtype=float32" for name, dtype in narrow.items() if dtype == "bfloat16"]
    if not have or have & NARROW or not asked:
        return None
    return (
        "this CPU has no instructions for bfloat16 (amx_bf16, avx512_bf16); float32 is faster on it, in a new run: "
        + " ".join(asked)
    )


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first CPU of the system says that it can do; empty where nothing says so."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
