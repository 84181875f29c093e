"""What the CPU at hand computes slowly, told before a run spends hours on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax

from jmlr_jax.config import Config
from jmlr_jax.parallel.distributed import console

NARROW = frozenset({"amx_bf16", "avx512_bf16"})  # a CPU without either widens every bfloat16 operand first


def slow_dtype(cfg: Config, flags: frozenset[str] | None = None) -> str | None:
    """A line on bfloat16 where this CPU has no instructions for it; None where there is nothing to say.

    Args:
      flags: of the CPU as Linux names them; None: those of this one. Where they are not known nothing is said.
    """
    if jax.default_backend() != "cpu":
        return None
    have = cpu_flags() if flags is None else flags
    llama, bert = cfg.generator.llama, cfg.retriever.bert
    dtypes = {"generator.llama": (llama.dtype, llama.param_dtype), "retriever.bert": (bert.dtype, bert.param_dtype)}
    asked = []
    for name, (dtype, stored) in dtypes.items():
        if dtype == "bfloat16":
            asked += [f"{name}.dtype=float32"] + [f"{name}.param_dtype=float32"] * (stored == "bfloat16")
    if not have or have & NARROW or not asked:
        return None
    return (
        "this CPU has no instructions for bfloat16 (amx_bf16, avx512_bf16); float32 is faster on it, in a new run: "
        + " ".join(asked)
    )


@cache
def tell(line: str) -> None:
    """Prints a line, once a process however many arms and seeds it trains."""
    console().print(line)


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first CPU of the system says that it can do; empty where nothing says so."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
