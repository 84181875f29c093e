"""``jmlr plan``: does it fit, how long does a step take, what does an epoch cost, asked of the TPU's own compiler.

The programs of a run (``programs.py``) are compiled from shapes alone, by libtpu, for a slice that need not be there.
No data, weights or prepared directory are read.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jmlr_jax.config import Config
from jmlr_jax.nn.abstract import shard_bytes
from jmlr_jax.parallel.libtpu import set_flags
from jmlr_jax.parallel.sharding import make_mesh, replicated_report
from jmlr_jax.planning.chips import CHIPS, GIB, Chip
from jmlr_jax.planning.estimate import Estimate, estimate, part
from jmlr_jax.planning.hlo import parse
from jmlr_jax.planning.lengths import Lengths, Packed, packed
from jmlr_jax.planning.programs import (
    PlanError,
    Source,
    encode_program,
    evaluate_program,
    resolved,
    step_program,
)
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.work import Work, step_work

SPARE = 0.05  # share of the memory that a plan should leave: the compiler's count is not the runtime's
MEDQA_QUESTIONS = 10_178
LARGE = 2**20  # bytes: arrays of at least this size should not stand whole on every chip
_OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm"
    r"|temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclass(frozen=True)
class Program:
    """What the compiler said of one program; memory in bytes per chip.

    Attributes:
      parts: memory by what it holds; they add up to `used`.
      estimate: None where the program does not fit, since then there is no program.
      typical: the same at the lengths that were given.
      compiling: seconds that the compiler took, here.
    """

    parts: dict[str, float]
    used: float
    available: float
    estimate: Estimate | None
    typical: Estimate | None = None
    compiling: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether it compiled."""
        return self.estimate is not None

    @property
    def spare(self) -> float:
        """Share of the memory that is left."""
        return 1 - self.used / self.available


@dataclass(frozen=True)
class Plan:
    """A configuration on a slice.

    Attributes:
      replicated: weights and moments of at least LARGE bytes that every chip holds whole, with their bytes.
      encode, evaluate: None where only the step was asked for.
      lengths, packed: those of a data set, and what the step computes for at them; None: everything at full length.
    """

    cfg: Config
    topology: str
    chip: Chip
    mesh: dict[str, int]
    work: Work
    replicated: list[tuple[str, int]]
    step: Program
    encode: Program | None = None
    evaluate: Program | None = None
    lengths: Lengths | None = None
    packed: Packed | None = None

    @property
    def chips(self) -> int:
        """Of the slice."""
        return math.prod(self.mesh.values())

    @property
    def seconds(self) -> float | None:
        """Of one step, estimated."""
        return self.step.estimate.total if self.step.estimate else None

    @property
    def mfu(self) -> float | None:
        """FLOPs that the method needs over those the chips could have done in the time."""
        if self.seconds is None:
            return None
        return self.work.total * self.cfg.train.batch_size / (self.seconds * self.chips * self.chip.peak)

    @property
    def epoch_hours(self) -> float | None:
        """Training steps for every question of MedQA once; refreshes and evaluations are not in it."""
        if self.seconds is None:
            return None
        return math.ceil(MEDQA_QUESTIONS / self.cfg.train.batch_size) * self.seconds / 3600


def make_plan(
    cfg: Config,
    topology: str | None = None,
    *,
    whole: bool = True,
    lengths: Lengths | None = None,
    flags: Mapping[str, str] | None = None,
) -> Plan:
    """Compiles a configuration for a slice; minutes for a large model.

    Args:
        topology: generation and shape in chips, as ``v5e:4x4``; None takes ``mesh.topology``.
        whole: the encoding and evaluation programs too, not the joint step alone.
        lengths: of the data set; the step is then priced at them too.
        flags: of the compiler, by name, beside those of :mod:`jmlr_jax.parallel.libtpu`, which they replace.

    Raises:
        PlanError: no topology, an unknown one, or a vocabulary size that only the data would tell.
        ShardingError: the mesh, the batch or a weight does not divide over the chips.
    """
    name = named_slice(cfg, topology)
    chip, devices = slice_of(name)
    mesh = make_mesh(cfg.mesh, devices)
    programs = {"step": step_program} | ({"encode": encode_program, "evaluate": evaluate_program} if whole else {})
    windows = cfg.generator.llama.windows
    sources = {key: make(cfg, mesh) for key, make in programs.items()}
    state, frozen, _ = sources["step"].arguments
    replicated = replicated_report({"state": state, "frozen": frozen}, LARGE)
    found = None if lengths is None else packed(lengths, cfg, mesh.shape["data"] * mesh.shape["fsdp"])
    compiled = {key: compile_program(source, chip, windows, found, flags) for key, source in sources.items()}
    work = step_work(resolved(cfg), PHASES["jmlr"])
    return Plan(cfg, name, chip, dict(mesh.shape), work, replicated, **compiled, lengths=lengths, packed=found)


def named_slice(cfg: Config, topology: str | None) -> str:
    """The slice that is asked for, or that the configuration names.

    Raises:
        PlanError: neither.
    """
    name = topology or cfg.mesh.topology
    if name is None:
        raise PlanError("which slice? give --topology, e.g. --topology v5e:4x4, or set mesh.topology")
    return name


def slice_of(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice, as the TPU compiler describes it.

    Raises:
        PlanError: libtpu is not installed, or it knows no such slice.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise PlanError(f"topology {topology!r}: generation {generation!r} is not one of {', '.join(CHIPS)}")
    # libtpu looks for a TPU's metadata unless it is told that there is none.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for key, value in (quiet | {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_MIN_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(key, value)
    set_flags()
    from jax.experimental import topologies

    more = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # whatever libtpu raises: the user's to mend in any case
        hint = "" if "libtpu" not in str(error) else "; pip install 'jmlr_jax[plan]' brings the TPU compiler"
        raise PlanError(f"topology {topology!r}: {str(error).splitlines()[0]}{hint}") from error
    return CHIPS[generation], list(found.devices)


def compile_program(
    source: Source,
    chip: Chip,
    windows: Sequence[int | None],
    at: Packed | None = None,
    flags: Mapping[str, str] | None = None,
) -> Program:
    """Memory by part and seconds of a program on its chips; with `at` also those at the lengths of a data set."""
    started = time.monotonic()
    optimizer, batch = shard_bytes(source.optimizer), shard_bytes(source.batch)
    weights = shard_bytes(source.arguments) - optimizer - batch
    parts: dict[str, float] = {"weights": weights, "optimizer": optimizer, "batch": batch}
    try:
        compiled = source.lower(*source.arguments).compile(compiler_options=dict(flags or {}))
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        alone = found[1] is None  # the compiler gave up on the temporaries before it had counted the rest
        used, available = (float(found[i]) * _UNITS[found[i + 1]] for i in ((5, 7) if alone else (1, 3)))
        used += sum(parts.values()) if alone else 0
        return Program(parts | {"temporaries": used - sum(parts.values())}, used, available, None)
    memory = compiled.memory_analysis()
    # Of arguments the compiler counts what it pads to its tiles, and not what the program never reads.
    parts["weights"] = memory.argument_size_in_bytes - optimizer - batch
    parts["temporaries"] = memory.temp_size_in_bytes
    parts["results"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts["code"] = memory.generated_code_size_in_bytes
    module = parse(compiled.as_text())
    priced = estimate(module.operations(), chip, windows)
    typical = None if at is None else estimate(module.operations(partial(_taken, at)), chip, windows)
    return Program(parts, sum(parts.values()), chip.hbm, priced, typical, time.monotonic() - started)


def _taken(at: Packed, where: str, branches: int) -> Sequence[float] | None:
    """How often each number of places is computed for, where a choice is of those."""
    shares = at.shares.get(part(where).partition("_")[0], ())
    return shares if len(shares) == branches else None
