"""A profiler trace of a running training, on request: ``kill -USR1`` to its process, as often as wanted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

STEPS = 5


class Tracer:
    """Traces the next few steps after each request, into ``FOLDER/profile`` (TensorBoard's profile page reads it)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._asked, self._left = threading.Event(), 0

    def after_step(self, result: Any) -> None:
        """To be called after each step; `result` is waited for before a trace ends, so that it holds whole steps."""
        if self._left:
            self._left -= 1
            if not self._left:
                jax.block_until_ready(result)
                jax.profiler.stop_trace()
        elif self._asked.is_set():
            self._asked.clear()
            self._left = STEPS
            jax.profiler.start_trace(str(self.folder / "profile"))

    def close(self) -> None:
        """Ends a trace under way."""
        if self._left:
            self._left = 0
            jax.profiler.stop_trace()

    def ask(self) -> None:
        """Requests a trace."""
        self._asked.set()


@contextmanager
def tracer(folder: Path) -> Iterator[Tracer]:
    """A :class:`Tracer` that SIGUSR1 asks; in a thread other than the main one no signal does."""
    made = Tracer(folder)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGUSR1, lambda *_: made.ask()) if main else None
    try:
        yield made
    finally:
        if main:
            signal.signal(signal.SIGUSR1, before)
        made.close()
