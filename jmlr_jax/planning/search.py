"""``jmlr plan --search``: the fastest settings of a slice that fit, one axis after the other.

Each compilation takes minutes, and all combinations would take weeks. From the configuration's own settings on, each
axis in turn takes the value that answers the most questions an hour, the others as they are; the search ends when a
turn over all axes changes nothing, or when its time is used up. What was tried is kept in a file, and not tried again.

Sides of attention blocks are no axis: the compiler gives no estimate for the kernels, so it could not tell them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from jmlr_jax import config_io
from jmlr_jax.config import Config
from jmlr_jax.config_models import Remat
from jmlr_jax.files import local_path
from jmlr_jax.nn.abstract import shard_bytes
from jmlr_jax.parallel.libtpu import FLAGS
from jmlr_jax.parallel.sharding import ShardingError, make_mesh
from jmlr_jax.planning.plan import SPARE, make_plan, named_slice, slice_of
from jmlr_jax.planning.programs import PlanError, step_program

SCOPED = "xla_tpu_scoped_vmem_limit_kib"
MEMORIES = (32 << 10, 64 << 10, 96 << 10)  # KiB of on-chip memory for one operation
PER_CHIP = (1, 2, 4, 8)  # questions of a step
Settings = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """Whether to search, and how.

    Attributes:
      budget: minutes after which nothing is begun; None goes on to the end.
      tried: file of earlier trials, read and added to; None keeps nothing.
    """

    search: bool = False
    budget: float | None = None
    tried: str | None = None

    def __post_init__(self) -> None:
        if not self.search and (self.budget or self.tried):
            raise PlanError("--budget and --tried are of a search; give --search too")


@dataclass(frozen=True)
class Trial:
    """What the compiler said of one choice of settings.

    Attributes:
      settings: as overrides, and the compiler's flag by its own name.
      used, available: bytes of a chip; used is None where there was nothing to compile: weights and optimizer alone are
        too many, or the batch does not divide.
      seconds: of a step; None where it does not fit.
      of: digest of all that decides the outcome.
    """

    settings: Settings
    used: float | None
    available: float
    seconds: float | None
    mfu: float | None
    of: str = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether it fits with memory to spare."""
        return self.seconds is not None and self.used is not None and self.used <= self.available * (1 - SPARE)

    @property
    def questions_an_hour(self) -> float:
        """0 where it does not fit."""
        return self.settings["train.batch_size"] / self.seconds * 3600 if self.fits and self.seconds else 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """The higher the better: questions an hour, and of those that do not fit the memory that is missing."""
        return self.questions_an_hour, -math.inf if self.used is None else -self.used

    @property
    def words(self) -> str:
        """The settings as a user would give them: overrides, and what stands before the command."""
        flags = [f"--{name}={value}" for name, value in self.settings.items() if FLAGS.get(name, "") != str(value)]
        before = [f"LIBTPU_INIT_ARGS={flag}" for flag in flags if "." not in flag]
        return " ".join([*before, *(f"{name}={value}" for name, value in self.settings.items() if "." in name)])


class Search:
    """A search over the settings of a slice.

    Args:
      topology: as :func:`jmlr_jax.planning.plan.make_plan`.
      tried: as in :class:`Look`.
      told: called with every trial as it ends.

    Raises:
      PlanError: no such slice, or a line of the file is no trial.
    """

    def __init__(
        self, cfg: Config, topology: str | None, tried: str | None = None, told: Callable[[Trial], None] | None = None
    ):
        self.cfg, self.topology, self.told = cfg, named_slice(cfg, topology), told
        self.chip, self.devices = slice_of(self.topology)
        self.file = None if tried is None else local_path(tried)
        self.known = {} if self.file is None else _read(self.file)
        self.trials: dict[str, Trial] = {}

    def run(self, seconds: float = math.inf) -> Trial:
        """Searches for about so long at most, a compilation that has begun being ended, and returns the best.

        Raises:
          PlanError: nothing that was tried fits.
        """
        until = time.monotonic() + seconds
        best, changed = self._try(self._own()), True
        while changed:
            changed = False
            for axis in (meshes, batches, pieces, remats, memories):
                for change in axis(best.settings, len(self.devices)):
                    if time.monotonic() > until:
                        return self._fitting(best)
                    one = self._try(best.settings | change)
                    if one.rank > best.rank:
                        best, changed = one, True
        return self._fitting(best)

    def ranked(self) -> list[Trial]:
        """All that were tried, the fastest that fits first."""
        return sorted(self.trials.values(), key=lambda one: one.rank, reverse=True)

    def _fitting(self, best: Trial) -> Trial:
        if not best.fits:
            raise PlanError(f"none of {len(self.trials)} settings fits with {SPARE:.0%} to spare: take a larger slice")
        return best

    def _own(self) -> Settings:
        """Where the search begins."""
        mesh = make_mesh(self.cfg.mesh, self.devices).shape
        found: Settings = {f"mesh.{name}": mesh[name] for name in ("data", "fsdp", "tensor")}
        found |= {"train.batch_size": self.cfg.train.batch_size, "train.accumulate": self.cfg.train.accumulate}
        return found | {"generator.llama.remat": self.cfg.generator.llama.remat, SCOPED: int(FLAGS[SCOPED])}

    def _try(self, settings: Settings) -> Trial:
        """What the compiler says of some settings, or said before."""
        cfg, flags = applied(self.cfg, settings)
        versions = [metadata.version(name) for name in ("jax", "libtpu")]
        asked = json.dumps([config_io.to_yaml(cfg), self.topology, flags, versions])
        of = hashlib.sha256(asked.encode()).hexdigest()
        if of in self.trials:
            return self.trials[of]
        one = self.known.get(of)
        if one is None:
            one = self._compiled(cfg, flags, settings, of)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as kept:
                    kept.write(json.dumps(asdict(one)) + "\n")
        self.trials[of] = one
        if self.told is not None:
            self.told(one)
        return one

    def _compiled(self, cfg: Config, flags: dict[str, str], settings: Settings, of: str) -> Trial:
        nothing = Trial(settings, None, self.chip.hbm, None, None, of)
        try:
            if shard_bytes(step_program(cfg, make_mesh(cfg.mesh, self.devices)).arguments) > self.chip.hbm:
                return nothing  # weights and optimizer alone are too many
            plan = make_plan(cfg, self.topology, whole=False, flags=flags)
        except ShardingError:
            return nothing
        return Trial(settings, plan.step.used, plan.step.available, plan.seconds, plan.mfu, of)


def applied(cfg: Config, settings: Settings) -> tuple[Config, dict[str, str]]:
    """A configuration with settings of a search, and the compiler's flags among them."""
    flags = {name: str(value) for name, value in settings.items() if "." not in name}
    raw = cfg.model_dump()
    for name, value in settings.items():
        *path, last = name.split(".")
        if path:
            node = raw
            for part in path:
                node = node[part]
            node[last] = value
    return Config.model_validate(raw), flags


def _read(file: Path) -> dict[str, Trial]:
    """Trials by digest; a line that a killed process left unfinished is passed over."""
    if not file.exists():
        return {}
    *lines, _ = file.read_text().split("\n")
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            one = Trial(**json.loads(line))
        except (ValueError, TypeError):
            raise PlanError(f"{file}:{number}: no trial of a search; remove the line, or the file") from None
        found[one.of] = one
    return found


# Axes: changes of the settings, each a dictionary; what does not divide is found out when it is tried.


def meshes(settings: Settings, chips: int) -> Iterator[Settings]:
    """Every mesh of the chips, those that shard the weights most first."""
    for tensor in (t for t in range(1, chips + 1) if chips % t == 0):
        for data in (d for d in range(1, chips // tensor + 1) if chips // tensor % d == 0):
            yield {"mesh.data": data, "mesh.fsdp": chips // tensor // data, "mesh.tensor": tensor}


def batches(settings: Settings, chips: int) -> Iterator[Settings]:
    """Questions of a step, so many for each group of chips that shares a question."""
    for each in PER_CHIP:
        yield {"train.batch_size": each * settings["mesh.data"] * settings["mesh.fsdp"]}


def pieces(settings: Settings, chips: int) -> Iterator[Settings]:
    """Numbers of microbatches that divide the batch."""
    size = settings["train.batch_size"]
    yield from ({"train.accumulate": count} for count in range(1, size + 1) if size % count == 0)


def remats(settings: Settings, chips: int) -> Iterator[Settings]:
    """What the decoder's backward pass computes again."""
    yield from ({"generator.llama.remat": kind} for kind in get_args(Remat))


def memories(settings: Settings, chips: int) -> Iterator[Settings]:
    """On-chip memory for one operation."""
    yield from ({SCOPED: size} for size in MEMORIES)
