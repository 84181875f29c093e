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
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import jax

from jmlr_jax.config import Config
from jmlr_jax.config_models import Remat
from jmlr_jax.errors import first_line
from jmlr_jax.files import local_path, write_text
from jmlr_jax.nn.abstract import shard_bytes
from jmlr_jax.parallel.sharding import ShardingError, make_mesh
from jmlr_jax.planning.chips import GIB
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
      axes: names of :data:`AXES`, with commas between, or ``all``; None does not search.
      budget: minutes after which nothing new is tried; None goes on to the end.
      tried: file of earlier trials, read and added to; None keeps nothing.
    """

    axes: str | None = None
    budget: float | None = None
    tried: str | None = None

    def __post_init__(self) -> None:
        if self.axes is None and (self.budget or self.tried):
            raise PlanError("--budget and --tried are of a search; give --search too")
        unknown = sorted({*self.names} - AXES.keys())
        if unknown:
            raise PlanError(f"--search {self.axes}: no axis {', '.join(unknown)}; there are {', '.join(AXES)}, and all")

    @property
    def names(self) -> tuple[str, ...]:
        """The axes to search over."""
        return tuple(AXES) if self.axes == "all" else tuple(self.axes.split(",")) if self.axes else ()


@dataclass(frozen=True)
class Trial:
    """What the compiler said of one choice of settings.

    Attributes:
      settings: as overrides, and the compiler's flag by its own name.
      used, available: bytes of a chip; used is None where nothing was compiled.
      seconds: of a step; None where it was not compiled.
      why: why there is no such step, or why it does not fit; None where it fits.
      of: digest of what decides the outcome, the code of this package apart.
    """

    settings: Settings
    used: float | None
    available: float
    seconds: float | None
    mfu: float | None
    why: str | None
    of: str = field(repr=False)

    @property
    def questions_an_hour(self) -> float:
        """0 where it does not fit."""
        return self.settings["train.batch_size"] / self.seconds * 3600 if self.seconds and self.why is None else 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """The higher the better: questions an hour, and of those that do not fit the memory that is missing."""
        return self.questions_an_hour, -math.inf if self.used is None else -self.used

    @property
    def words(self) -> str:
        """The settings as a command has them: what stands before it, and overrides."""
        flags = " ".join(f"--{name}={value}" for name, value in self.settings.items() if "." not in name)
        overrides = " ".join(f"{name}={value}" for name, value in self.settings.items() if "." in name)
        return f"LIBTPU_INIT_ARGS='{flags}' jmlr run {overrides}"


class Search:
    """A search over the settings of a slice.

    Args:
      topology: as :func:`jmlr_jax.planning.plan.make_plan`.
      look: axes, and the file of earlier trials.
      told: called with every trial as it ends.

    Raises:
      PlanError: no such slice, or a line of the file is no trial.
      OSError: the file cannot be written.
    """

    def __init__(self, cfg: Config, topology: str | None, look: Look, told: Callable[[Trial], None] | None = None):
        self.cfg, self.topology, self.look, self.told = cfg, named_slice(cfg, topology), look, told
        self.chip, self.devices = slice_of(self.topology)
        self.file = None if look.tried is None else local_path(look.tried)
        self.known = {} if self.file is None else _opened(self.file)
        self.trials: dict[str, Trial] = {}

    def run(self) -> Trial:
        """Searches, and returns the best; a compilation that has begun is finished when the time is used up.

        Raises:
          PlanError: nothing that was tried fits.
        """
        until = math.inf if self.look.budget is None else time.monotonic() + self.look.budget * 60
        best, changed = self._try(self._own()), True
        while changed:
            changed = False
            for axis in self.look.names:
                for change in AXES[axis](best.settings, len(self.devices)):
                    if time.monotonic() >= until:
                        return self._fitting(best, "give it a longer --budget")
                    one = self._try(best.settings | change)
                    if one.rank > best.rank:
                        best, changed = one, True
        return self._fitting(best, "take a larger slice, or more axes")

    def ranked(self) -> list[Trial]:
        """All that were tried, the fastest that fits first."""
        return sorted(self.trials.values(), key=lambda one: one.rank, reverse=True)

    def _fitting(self, best: Trial, remedy: str) -> Trial:
        if best.why is not None:
            raise PlanError(f"none of {len(self.trials)} settings fits; the nearest: {best.why}; {remedy}")
        return best

    def _own(self) -> Settings:
        """Where the search begins: the configuration's settings, on one axis of weights if its mesh is of another
        slice, and the on-chip memory that a run would have now."""
        try:
            mesh = dict(make_mesh(self.cfg.mesh, self.devices).shape)
        except ShardingError:
            mesh = {"data": 1, "fsdp": len(self.devices), "tensor": 1}
        found: Settings = {f"mesh.{name}": mesh[name] for name in ("data", "fsdp", "tensor")}
        train, rows = self.cfg.train, mesh["data"] * mesh["fsdp"]
        found |= {"train.batch_size": train.batch_size, "train.accumulate": train.accumulate}
        found |= {"eval.batch_size": _up(self.cfg.eval.batch_size, rows)}
        found |= {"generator.llama.remat": self.cfg.generator.llama.remat}
        given = re.search(rf"--{SCOPED}=(\d+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
        assert given is not None  # slice_of has set it
        return found | {SCOPED: int(given[1])}

    def _try(self, settings: Settings) -> Trial:
        """What the compiler says of some settings, or said before."""
        cfg, flags = applied(self.cfg, settings)
        parts = [cfg.retriever, cfg.generator, cfg.train, cfg.mesh.model_copy(update={"topology": self.topology})]
        versions = [metadata.version(name) for name in ("jax", "libtpu", "jmlr_jax")]
        rest = [flags, os.environ.get("LIBTPU_INIT_ARGS"), versions]
        of = hashlib.sha256(json.dumps([*(part.model_dump(mode="json") for part in parts), *rest]).encode()).hexdigest()
        if of in self.trials:
            return self.trials[of]
        one = self.known.get(of)
        if one is None:
            one = self._compiled(cfg, flags, settings, of)
            if self.file is not None:
                with self.file.open("a") as kept:
                    kept.write(json.dumps(asdict(one)) + "\n")
        self.trials[of] = one
        if self.told is not None:
            self.told(one)
        return one

    def _compiled(self, cfg: Config, flags: dict[str, str], settings: Settings, of: str) -> Trial:
        def none(why: str) -> Trial:
            return Trial(settings, None, self.chip.hbm, None, None, why, of)

        if cfg.train.batch_size % cfg.train.accumulate:
            return none(f"train.accumulate={cfg.train.accumulate} does not divide the batch")
        try:
            held = shard_bytes(step_program(cfg, make_mesh(cfg.mesh, self.devices)).arguments)
            if held > self.chip.hbm:
                return none(f"weights, optimizer and batch alone take {held / GIB:.1f} GiB a chip")
            plan = make_plan(cfg, self.topology, whole=False, flags=flags)
        except (ShardingError, jax.errors.JaxRuntimeError) as error:
            return none(first_line(error))
        step, why = plan.step, None
        if not step.fits or step.spare < SPARE:
            why = f"{step.used / GIB:.1f} of {step.available / GIB:.1f} GiB a chip, and {SPARE:.0%} should be spare"
        return Trial(settings, step.used, step.available, plan.seconds, plan.mfu, why, of)


def applied(cfg: Config, settings: Settings) -> tuple[Config, dict[str, str]]:
    """A configuration with settings of a search, and the compiler's flags among them."""
    flags = {name: str(value) for name, value in settings.items() if "." not in name}

    def part(section: str) -> dict[str, Any]:
        split = {tuple(name.rpartition(".")[::2]): value for name, value in settings.items()}
        return {name: value for (of, name), value in split.items() if of == section}

    llama = cfg.generator.llama.model_copy(update=part("generator.llama"))
    changed = {name: getattr(cfg, name).model_copy(update=part(name)) for name in ("mesh", "train", "eval")}
    return cfg.model_copy(update=changed | {"generator": cfg.generator.model_copy(update={"llama": llama})}), flags


def _opened(file: Path) -> dict[str, Trial]:
    """Trials by digest, of a file that can be added to; a line that a killed process left unfinished is taken away."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab"):
        pass
    *lines, unfinished = file.read_bytes().split(b"\n")
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            one = Trial(**json.loads(line))
            one.rank, one.words  # noqa: B018  # a trial whose settings are of another kind has neither
        except (ValueError, TypeError, KeyError, AttributeError):
            raise PlanError(f"{file}:{number}: no trial of a search; remove the line, or the file") from None
        found[one.of] = one
    if unfinished:
        write_text(file, "".join(line.decode() + "\n" for line in lines))
    return found


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# Axes: changes of the settings, each a dictionary; what does not divide is found out when it is tried.


def _meshes(settings: Settings, chips: int) -> Iterator[Settings]:
    """Every mesh of the chips, those that shard the weights most first; evaluation's batch goes along."""
    for tensor in (t for t in range(1, chips + 1) if chips % t == 0):
        for data in (d for d in range(1, chips // tensor + 1) if chips // tensor % d == 0):
            found = {"mesh.data": data, "mesh.fsdp": chips // tensor // data, "mesh.tensor": tensor}
            yield found | {"eval.batch_size": _up(settings["eval.batch_size"], chips // tensor)}


def _batches(settings: Settings, chips: int) -> Iterator[Settings]:
    """Questions of a step, so many for each group of chips that shares a question."""
    for each in PER_CHIP:
        yield {"train.batch_size": each * settings["mesh.data"] * settings["mesh.fsdp"]}


def _pieces(settings: Settings, chips: int) -> Iterator[Settings]:
    """Numbers of microbatches that divide the batch."""
    size = settings["train.batch_size"]
    yield from ({"train.accumulate": count} for count in range(1, size + 1) if size % count == 0)


def _remats(settings: Settings, chips: int) -> Iterator[Settings]:
    """What the decoder's backward pass computes again."""
    yield from ({"generator.llama.remat": kind} for kind in get_args(Remat))


def _memories(settings: Settings, chips: int) -> Iterator[Settings]:
    """On-chip memory for one operation."""
    yield from ({SCOPED: size} for size in MEMORIES)


AXES: dict[str, Callable[[Settings, int], Iterator[Settings]]] = {
    "mesh": _meshes,
    "batch": _batches,
    "accumulate": _pieces,
    "remat": _remats,
    "memory": _memories,
}
