"""Memory is asked before it is taken: what the compiled step of a phase needs, beside what is free for it.

A step is compiled here for shapes, before a phase begins, and training finds that very program compiled. Where it does
not fit, the system would end the process without a word minutes later; here the user is told which value would fit,
and that value has been compiled too.
"""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jmlr_jax.errors import JmlrError
from jmlr_jax.nn.abstract import shard_bytes
from jmlr_jax.parallel.distributed import gather
from jmlr_jax.parallel.progress import track
from jmlr_jax.parallel.sharding import batch_ways
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import Phase
from jmlr_jax.run.weights import is_trained, phase_steps
from jmlr_jax.training.program import batch_shapes, phase_program

RESERVE = 0.05  # of what is free is left to what no program counts: the runtime, a checkpoint on its way to the disk
GIB = 1 << 30


class MemoryShort(JmlrError):
    """A step that needs more memory than there is; the message has both numbers and a value that would fit."""


class Knobs(NamedTuple):
    """What a step's memory can be brought down by, without another result: ``train.accumulate``, and ``remat``."""

    accumulate: int
    remat: bool  # full, of both models; else as configured


class Verdict(NamedTuple):
    """What the fullest place needs and has, bytes; needed is None where the compiler found that it cannot be."""

    fits: bool
    needed: int | None
    free: int


def ask_memory(run: Run, phases: Sequence[Phase]) -> None:
    """Compiles the step of every phase that is still to be trained and compares its memory with what is free.

    Every process of a job must call it, and all come to the same answer.

    Raises:
      MemoryShort: a step needs more; the message names what would fit.
    """
    waiting = [phase for phase in phases if not is_trained(run, phase.name)]
    begun = len(waiting) < len(phases)
    for phase in track(waiting, len(waiting), "compiling", "steps"):
        asked = Knobs(run.cfg.train.accumulate, remat=False)
        found = _verdict(run, phase, asked)
        if not found.fits:
            raise MemoryShort(f"{phase.name}: {_said(found)}; {_remedy(run, phase, asked, found, begun)}")


def _remedy(run: Run, phase: Phase, asked: Knobs, found: Verdict, begun: bool) -> str:
    """The first value that fits when it is compiled, as the user would give it; at most three are."""
    last = found
    for knobs in _candidates(run, asked, found, begun):
        last = _verdict(run, phase, knobs)
        if last.fits:
            assert last.needed is not None
            fresh = ", in a new directory (--run-dir)" if begun and knobs.accumulate != asked.accumulate else ""
            return f"give {_given(knobs, asked)}, which needs {last.needed / GIB:.2f} GiB{fresh}"
    more = "fewer train.candidates, shorter passages, a smaller model or a larger machine"
    if last is found:
        return f"it cannot be cut any further: {more}"
    return f"with {_given(knobs, asked)} {_said(last).removeprefix('a step ')} still: {more}"


def _candidates(run: Run, asked: Knobs, found: Verdict, begun: bool) -> list[Knobs]:
    """What to try, the least change first.

    Microbatches cost nothing but belong to what every phase is made from, so once an earlier one has been trained the
    recomputation of layers comes first, which does not belong to it.
    """
    batch, ways = run.cfg.train.batch_size, batch_ways(run.mesh)
    more = [a for a in range(asked.accumulate + 1, batch + 1) if batch % a == 0 and batch // a % ways == 0]
    already = {run.llama.remat, run.retriever.bert.remat} == {"full"}
    enough = more[-1:]
    if found.needed is not None:  # what is not weights falls about as the microbatch does
        enough = [a for a in more if found.needed * asked.accumulate / a <= found.free * (1 - RESERVE)][:1] or enough
    accumulated = [Knobs(a, remat=False) for a in dict.fromkeys((*enough, *more[-1:]))]
    recomputed = [] if already else [Knobs(a, remat=True) for a in (asked.accumulate, *more[-1:])]
    return [*recomputed[:1], *accumulated] if begun else [*accumulated, *recomputed[-1:]]


def _given(knobs: Knobs, asked: Knobs) -> str:
    """The overrides."""
    words = [f"train.accumulate={knobs.accumulate}"] if knobs.accumulate != asked.accumulate else []
    words += ["generator.llama.remat=full", "retriever.bert.remat=full"] if knobs.remat else []
    return " ".join(words)


def _said(found: Verdict) -> str:
    free = f"{found.free / GIB:.2f} GiB are free"
    if found.needed is None:
        return f"a step needs more memory than a device has ({free})"
    return f"a step needs {found.needed / GIB:.2f} GiB of memory, {free}"


def _verdict(run: Run, phase: Phase, knobs: Knobs) -> Verdict:
    """Whether a step fits everywhere; processes that share a host share its memory."""
    needed = step_bytes(run, phase, knobs)
    own = [device for device in run.mesh.devices.flat if device.process_index == jax.process_index()]
    place, free = _free(own)
    if place is None:
        place, devices = socket.gethostname(), len(own)
    else:
        devices = 1  # each has its own
    brought = gather([place, None if needed is None else needed * devices, free])
    worst = Verdict(True, 0, 0)
    for name in dict.fromkeys(name for name, _, _ in brought):
        here = [(need, left) for each, need, left in brought if each == name]
        left = min((left for _, left in here if left is not None), default=None)
        if left is None:  # nobody can say
            continue
        if any(need is None for need, _ in here):
            return Verdict(False, None, left)
        one = Verdict(sum(need for need, _ in here) <= left * (1 - RESERVE), sum(need for need, _ in here), left)
        worst = one if worst.free == 0 or (worst.fits and not one.fits) else worst
    return worst


def _free(own: Sequence[jax.Device]) -> tuple[str | None, int | None]:
    """The fullest of this process's devices by name and the bytes that it has free; no name where the host's count."""
    stats = {device: device.memory_stats() for device in own}
    if not all(stats.values()):
        return None, host_free_bytes()
    left = {device: found["bytes_limit"] - found["bytes_in_use"] for device, found in stats.items() if found}
    fullest = min(left, key=lambda device: left[device])
    return f"{fullest.process_index} {fullest}", left[fullest]


def step_bytes(run: Run, phase: Phase, knobs: Knobs) -> int | None:
    """Bytes that a step takes on one device beyond what lies there already: the compiled program's own figure.

    Returns:
      None where the compiler itself ends for lack of memory.
    """
    train = run.cfg.train.model_copy(update={"accumulate": knobs.accumulate})
    retriever, llama = run.retriever, run.llama
    if knobs.remat:
        retriever = retriever.model_copy(update={"bert": retriever.bert.model_copy(update={"remat": "full"})})
        llama = llama.model_copy(update={"remat": "full"})
    cfg = run.cfg.model_copy(update={"train": train})
    steps, ids = phase_steps(train, phase), run.prepared.generator_ids
    program = phase_program(cfg, phase, retriever, llama, ids, steps, run.mesh)
    batch = batch_shapes(cfg, phase, run.mesh)
    try:
        with jax.set_mesh(run.mesh):
            found = program.step.lower(program.state, program.frozen, batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    if found is None:  # a backend that says nothing
        return 0
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(total - found.alias_size_in_bytes - shard_bytes(program.frozen.get("base", ())))


def host_free_bytes() -> int | None:
    """Bytes that this process can still take: of what the system has available, its control groups and its limits.

    Returns:
      None where the system says nothing.
    """
    return min((*_available(), *cgroup_free_bytes(), *_limit()), default=None)


def _available() -> Iterator[int]:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _limit() -> Iterator[int]:
    """What `ulimit -v` leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    for line in _lines(Path("/proc/self/statm")) if limit != resource.RLIM_INFINITY else ():
        yield max(0, limit - int(line.split()[0]) * resource.getpagesize())


def cgroup_free_bytes(named: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each control group around this process leaves of its limit, file caches that can go counted as free."""
    for line in _lines(named):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _groups(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _groups(root / "memory", path, *names)


def _groups(root: Path, path: str, limit: str, used: str, cache: str) -> Iterator[int]:
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        most, now = _lines(group / limit), _lines(group / used)
        if most and now and most[0].isdecimal():
            stat = dict(line.split() for line in _lines(group / "memory.stat"))
            yield max(0, int(most[0]) - int(now[0]) + int(stat.get(cache, 0)))
        if group == root:
            return


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
