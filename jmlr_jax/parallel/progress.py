"""What a long loop says of itself: a bar on a terminal, elsewhere a plain line every so many seconds.

Process 0 alone speaks, and of one loop at a time: what runs inside a loop that is shown is silent, and so is what runs
beside it, as a refresh does beside training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from jmlr_jax.parallel import distributed

FIRST_SECONDS = 5.0  # until a loop's first line, so that short ones say nothing
EVERY_SECONDS = 30.0  # between its further ones
_LOOK_SECONDS = 0.5  # between looks at the clock

_shown = threading.Lock()  # held by the loop that is shown
T = TypeVar("T")


class Tally:
    """How far a loop is, in words. Every time is an argument, in seconds from any start.

    Args:
      name: what is done, such as ``training jmlr``.
      total, unit: how many of what.
      now: when it begins.
      done: how many an earlier run has done.
      per: what one of them counts for in the rate, and the name of that: ``(4, "questions")`` for steps of 4.
    """

    def __init__(
        self, name: str, total: int, unit: str, now: float, *, done: int = 0, per: tuple[int, str] | None = None
    ):
        self.name, self.total, self.unit, self.per = name, total, unit, per or (1, unit)
        self.done, self.note = done, ""
        self._first, self._start, self._due = done, now, now + FIRST_SECONDS
        self._mark: tuple[float, int] | None = None  # when the rate was last told, and what was done by then

    def update(self, done: int, note: str, now: float) -> None:
        """Takes how many are done by now, and what else there is to say, such as losses."""
        self.done, self.note = done, note
        if self._mark is None:  # the rate begins after the first one, which compiles
            self._mark = now, done

    def due(self, now: float) -> str | None:
        """The line to print if it is time for one: done of how many, note, rate since the last line, time left."""
        if now < self._due:
            return None
        self._due = now + EVERY_SECONDS
        done, (since, before) = self.done, self._mark or (now, self.done)
        self._mark = (now, done) if self._mark else None
        words = [f"{done:,} of {self.total:,} {self.unit}", *([self.note] if self.note else [])]
        if done > before:
            each = (now - since) / (done - before)
            words += [self._rate(each), f"{span((self.total - done) * each)} left"]
        else:
            words.append(f"{span(now - self._start)} so far")
        return f"{self.name}: " + ", ".join(words)

    def took(self, now: float) -> float:
        """Seconds since it began."""
        return now - self._start

    def last(self, now: float) -> str:
        """The line for its end: how many in what time, note, rate over all of it."""
        made, seconds = self.done - self._first, self.took(now)
        words = [f"{made:,} {self.unit} in {span(seconds)}", *([self.note] if self.note else [])]
        return f"{self.name}: " + ", ".join(words + ([self._rate(seconds / made)] if made and seconds else []))

    def _rate(self, seconds: float) -> str:
        rate = self.per[0] / max(seconds, 1e-9)
        return f"{rate:,.{0 if rate >= 100 else 1 if rate >= 1 else 3}f} {self.per[1]}/s"


def span(seconds: float) -> str:
    """A length of time for people.

    >>> span(4.4), span(200), span(7500)
    ('4 s', '3 min 20 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


class Stage:
    """A loop while it runs, shown if no other one is; use as a context manager.

    Args:
      name, total, unit, done, per: see :class:`Tally`.
      brief: says nothing at its end unless it took ``FIRST_SECONDS``.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        per: tuple[int, str] | None = None,
        brief: bool = False,
    ):
        self._tally = Tally(name, total, unit, time.monotonic(), done=done, per=per)
        self._brief, self._console = brief, distributed.console()
        self._bar: Progress | None = None
        self._speaks, self._ended = False, threading.Event()
        self._lines = threading.Thread(target=self._tell, name="progress", daemon=True)

    def __enter__(self) -> Stage:
        self._speaks = not self._console.quiet and _shown.acquire(blocking=False)
        if self._speaks and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
                console=self._console,
                transient=True,
                expand=True,  # on a narrow terminal the note is cut, not the bar
            )
            tally = self._tally
            self._bar.add_task(tally.name, total=tally.total, completed=tally.done, note=tally.note)
            self._bar.start()
        elif self._speaks:
            self._lines.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.stop()
        else:
            self._ended.set()
            self._lines.join()
        _shown.release()
        now = time.monotonic()
        if error is None and not (self._brief and self._tally.took(now) < FIRST_SECONDS):
            self._console.print(self._tally.last(now))

    def update(self, done: int, note: str = "") -> None:
        """Takes how many are done by now, and what else there is to say."""
        self._tally.update(done, note, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)

    def _tell(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            line = self._tally.due(time.monotonic())
            if line is not None:
                self._console.print(line)


def track(items: Iterable[T], total: int, name: str, unit: str, each: int = 1) -> Iterator[T]:
    """The items, one after the other, shown as a loop over ``total`` units of which every item holds ``each``."""
    with Stage(name, total, unit, brief=True) as stage:
        for number, item in enumerate(items, 1):
            yield item
            stage.update(min(number * each, total))
