"""Seconds of a compiled step by part, from the compiler's cycles and what it gives no estimate for.

What is whose: cycles of every fusion are the compiler's. Attention kernels have none and get a roofline of their own;
collectives get bytes over links. A collective that the program waits for counts whole; one that runs beside other work
counts only as far as it outlasts the work of the same loop. Nothing here has run on a TPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from jmlr_jax.nn.attention import visited
from jmlr_jax.planning.chips import Chip
from jmlr_jax.planning.hlo import COLLECTIVES, Operation

PARTS = ("encode", "judge", "read_forward", "read_recompute", "read_backward", "update", "rest")
EXTRA = ("attention_kernels", "collectives_exposed")
# Vector operations on each score: scale, mask, maximum, exponential, sum, cast. Matrix and vector units are taken to
# work in turn, though a good kernel overlaps them.
VECTOR_FORWARD, VECTOR_BACKWARD = 12, 16
VECTOR_LANES = 4096  # operations a cycle of one core's vector unit
PRODUCTS_FORWARD, PRODUCTS_BACKWARD = 2, 5  # the fused backward kernel computes the scores again


@dataclass(frozen=True)
class Estimate:
    """Of one run of a program on each chip.

    Attributes:
      seconds: by part; they add up to the whole.
      flops: of matrix products, attention kernels included; `recomputed` of them by rematerialisation.
      collective_bytes: received by a chip, by collective.
      exposed: the share of the collectives' own time that the program waits for.
    """

    seconds: dict[str, float]
    flops: float
    recomputed: float
    kernel_flops: float
    collective_bytes: dict[str, float]
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the whole."""
        return sum(self.seconds.values())


def part(where: str) -> str:
    """The part of the step that a path of names belongs to.

    >>> part("jit(step)/while/body/closed_call/jvp(judge)/read/while/body/dot_general")
    'judge'
    >>> part("jit(step)/while/body/transpose(jvp(read))/while/body/checkpoint/rematted_computation/dot_general")
    'read_recompute'
    """
    for name in ("encode", "judge", "update"):
        if f"/{name}/" in where or f"({name})" in where or where.endswith(f"/{name}"):
            return name
    if "/read/" in where or "(read)" in where:
        if "rematted_computation" in where:
            return "read_recompute"
        return "read_backward" if "transpose(" in where else "read_forward"
    return "rest"


def estimate(operations: Iterable[Operation], chip: Chip, windows: Sequence[int | None] = (None,)) -> Estimate:
    """Prices the operations of a program (:meth:`jmlr_jax.planning.hlo.Module.operations`) on a chip.

    Args:
        windows: of each layer's attention, which the kernels' shapes do not show. A kernel counts as their mean: layers
            with and without a window are one program, with a kernel for either.
    """
    seconds: dict[str, float] = dict.fromkeys((*PARTS, *EXTRA), 0.0)
    flops = recomputed = kernel_flops = waited = 0.0
    moved: dict[str, float] = defaultdict(float)
    work_of_loop: dict[str, float] = defaultdict(float)
    beside_of_loop: dict[str, float] = defaultdict(float)
    for one in operations:
        belongs = part(one.where) if part(one.where) != "rest" else part(one.loop)
        work = one.cycles / chip.clock * one.times
        found = one.flops
        if one.kind == "kernel":
            found, time = _kernel(one, chip, windows)
            kernel_flops += found * one.times
            seconds["attention_kernels"] += time * one.times
            work_of_loop[one.loop] += time * one.times
        elif one.kind in COLLECTIVES:
            moved[one.kind] += one.bytes * one.times
            time = one.bytes / (chip.link * chip.links) * one.times
            if one.overlapped:
                beside_of_loop[one.loop] += time
            else:
                waited += time
        flops += found * one.times
        if "rematted_computation" in one.where:
            recomputed += found * one.times
        seconds[belongs] += work
        work_of_loop[one.loop] += work
    late = sum(max(0.0, time - work_of_loop[loop]) for loop, time in beside_of_loop.items())
    seconds["collectives_exposed"] = waited + late
    everything = waited + sum(beside_of_loop.values())
    share = (waited + late) / everything if everything else 0.0
    return Estimate(seconds, flops, recomputed, kernel_flops, dict(moved), share)


def _kernel(one: Operation, chip: Chip, windows: Sequence[int | None]) -> tuple[float, float]:
    """FLOPs and seconds of one call of an attention kernel."""
    *rows, heads, length, width = next(shape for shape in one.operands if len(shape) >= 3 and shape[-1] % 64 == 0)
    pairs = (rows[0] if rows else 1) * heads * mean(visited(length, window) for window in windows)
    backward = "dkv" in one.where or "transpose" in one.where and "rematted" not in one.where
    products, vector = (PRODUCTS_BACKWARD, VECTOR_BACKWARD) if backward else (PRODUCTS_FORWARD, VECTOR_FORWARD)
    flops = products * 2.0 * width * pairs
    lanes = VECTOR_LANES * (2 if chip.megacore else 1) * chip.clock
    return flops, flops / (chip.peak * chip.fill) + vector * pairs / lanes
