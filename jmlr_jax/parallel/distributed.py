"""Several processes as one program: how they find one another, agree, and end when one of them is lost.

Devices exchange arrays through collectives in compiled programs; all of those are launched by the main thread, in the
same order everywhere. What stands here is the traffic between hosts: short JSON values through the key-value store of
``jax.distributed``, which works from any thread and takes no device. With one process everything is immediate.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax
from jax._src import distributed as _jax_distributed  # the store has no public name; Orbax reads it here too
from rich.console import Console
from rich.segment import Segment

from jmlr_jax.errors import JmlrError

START_SECONDS = 300  # for all processes to be there
HEARTBEAT_SECONDS = 30  # of silence after which a process counts as lost and the others end
SHUTDOWN_SECONDS = 30  # that a process which is done waits for the others
WHOLE_WEEK_MS = 7 * 24 * 3600 * 1000  # waiting ends with the other's work or its death, not by the clock
STOP_AFTER = 2  # steps: a process dispatches at most one more than every other has, so all hear of a stop in time

_calls = itertools.count()  # every process makes the same calls in the same order, so numbers name them
_watcher: subprocess.Popen[bytes] | None = None


class DistributedError(JmlrError):
    """The processes of a job did not find one another, or do not agree."""


def start(text: str) -> None:
    """Joins the job; to be called before anything asks JAX for devices.

    Args:
      text: ``auto`` where the platform knows its processes (TPU VM, Slurm), or ``HOST:PORT,ID,COUNT`` with the address
        of process 0, the number of this process from 0, and how many there are.

    Raises:
      DistributedError: `text` is neither, or the processes do not find one another.
    """
    # Its handler would swallow SIGTERM outside of training; `Stop` below does what it does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        where = {} if text == "auto" else _parse(text)
        jax.distributed.initialize(
            **where,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        known = "" if text != "auto" else "; where nothing tells the processes of one another, give HOST:PORT,ID,COUNT"
        raise DistributedError(f"--distributed {text}: {error}{known}") from error
    watch()


def finish() -> None:
    """Leaves the job once every process has come this far; without one, nothing."""
    if _watcher is not None:
        jax.distributed.shutdown()
        _dismiss_watcher()


def lost() -> str:
    """What to say where a process ends early."""
    job = _jax_distributed.global_state
    return (
        f"jmlr: process {job.process_id} of {job.num_processes} has ended before its work was done: it failed or was "
        "killed, or it lost another process of the job, whose own output says why. Start the same command in all "
        "processes again; training continues from the last checkpoint"
    )


def abandon(status: int) -> NoReturn:
    """Ends this process at once, without waiting for processes that may be gone; the others notice."""
    sys.stdout.flush()
    sys.stderr.flush()
    _dismiss_watcher()
    os._exit(status)


def is_first() -> bool:
    """Whether this is process 0, which alone writes what is not sharded, and talks to the user.

    One process is the first without asking JAX, which would take its devices; some commands need none.
    """
    return _store() is None or jax.process_index() == 0


_UNPRINTED = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class _Console(Console):
    """Control characters of a text are shown, not sent: a passage must not move the cursor or recolour a terminal."""

    def render(self, *args: Any, **named: Any) -> Iterable[Segment]:
        for part in super().render(*args, **named):
            yield part if part.control else Segment(part.text.translate(_UNPRINTED), part.style)


def console(*, out: bool = False) -> Console:
    """Standard error of process 0, or its standard output for what a command was asked for; the others are silent.

    Text is printed as it stands: a path or a record may hold brackets, colons or numbers that mean nothing to us.
    """
    return _Console(stderr=not out, quiet=not is_first(), markup=False, emoji=False, highlight=False, soft_wrap=True)


def from_first(act: Callable[[], Any]) -> Any:
    """What `act` returns in process 0; it runs nowhere else, and all wait for it. The result must be JSON.

    Raises:
      DistributedError: it failed there; process 0 raises its own error.
    """
    if jax.process_count() == 1:
        return act()
    key = f"jmlr/{next(_calls)}"
    if not is_first():
        said = json.loads(_store().blocking_key_value_get(key, WHOLE_WEEK_MS))
        if "error" in said:
            raise DistributedError(f"process 0: {said['error']}")
        return said["value"]
    try:
        value = act()
    except Exception as error:
        _store().key_value_set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    _store().key_value_set(key, json.dumps({"value": value}))
    return value


def on_first(act: Callable[[], object]) -> None:
    """Runs `act` in process 0, for which all wait; errors as in :func:`from_first`."""

    def acted() -> None:
        act()

    from_first(acted)


def gather(value: Any) -> list[Any]:
    """The JSON values that all processes bring, in their order; also a barrier."""
    if jax.process_count() == 1:
        return [value]
    key = f"jmlr/{next(_calls)}"
    _store().key_value_set(f"{key}/{jax.process_index():06d}", json.dumps(value))
    _store().wait_at_barrier(key, WHOLE_WEEK_MS)
    return [json.loads(text) for _, text in sorted(_store().key_value_dir_get(f"{key}/"))]


def check_same(what: str, value: Any, remedy: str) -> None:
    """Raises DistributedError in all processes if they bring different values of `what`."""
    values = gather(value)
    other = next((i for i, each in enumerate(values) if each != values[0]), None)
    if other is not None:
        raise DistributedError(f"{what} of process {other} differs from that of process 0: {remedy}")


class Stop:
    """Ends a loop after the same step in every process, whichever of them was asked to stop.

    The first to be asked writes the step into the store, a little ahead; the others read it before every step.
    """

    def __init__(self) -> None:
        self._key, self._last = f"jmlr/{next(_calls)}/stop", None if jax.process_count() > 1 else -1

    def after(self, step: int, asked: bool) -> bool:
        """Whether the loop ends after this step; to be called before each one.

        Args:
          step: about to be dispatched.
          asked: whether this process was asked to stop.
        """
        if jax.process_count() == 1:
            return asked
        if self._last is None and asked:
            try:
                _store().key_value_set(self._key, str(step + STOP_AFTER))
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise
        if self._last is None:
            try:
                self._last = int(_store().key_value_try_get(self._key))
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):
                    raise
        return self._last is not None and step >= self._last


def _parse(text: str) -> dict[str, Any]:
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError("expected auto, or HOST:PORT,ID,COUNT such as 10.0.0.2:8476,0,4")
    number, count = map(int, numbers)
    if number >= count:
        raise ValueError(f"process {number} of {count}: they are numbered from 0")
    return {"coordinator_address": address, "process_id": number, "num_processes": count}


def _store() -> Any:
    return _jax_distributed.global_state.client


def watch() -> None:
    """Starts a shell that says so when this process ends without having said that it does.

    JAX ends a process that has lost its job from within, with a stack trace; a kill or lack of memory leaves no word.
    """
    global _watcher
    words = ["sh", "-c", 'read -r done || printf "%s\\n" "$0" >&2', lost()]
    _watcher = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


def _dismiss_watcher() -> None:
    global _watcher
    if _watcher is not None and _watcher.stdin is not None:
        _watcher.communicate(b"done\n")
        _watcher = None
