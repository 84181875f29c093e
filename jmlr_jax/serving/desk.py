"""The desk between clients and the engine: a bounded queue, one thread that computes, events back to each client.

Questions that wait for the same arm are answered together, up to eight. Only the thread touches the engine, so nothing
is computed twice at once, and an error in a batch is found again by its members one by one: it hurts its own alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jmlr_jax.answering.asked import Answer, Asked
from jmlr_jax.answering.engine import Engine
from jmlr_jax.answering.program import ROWS
from jmlr_jax.errors import JmlrError
from jmlr_jax.serving.metrics import Metrics

LOG = logging.getLogger("jmlr.serve")
Work = Asked | Callable[[Engine], Any]


class Full(JmlrError):
    """The queue holds as many requests as it may."""


class Loading(JmlrError):
    """Models are still being opened and compiled."""


class Late(JmlrError):
    """A request took longer than it may."""


class Failed(JmlrError):
    """A fault of ours; the log has it."""


class Ticket:
    """One request at the desk: what is asked, and the events that come back.

    Attributes:
      deadline: of the loop's clock.
    """

    def __init__(self, work: Work, timeout: float):
        self.work, self._loop = work, asyncio.get_running_loop()
        self.deadline = self._loop.time() + timeout
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._left = threading.Event()

    @property
    def left(self) -> bool:
        """Whether nobody waits any more."""
        return self._left.is_set()

    def cancel(self) -> None:
        """The client has left, or waited too long."""
        self._left.set()

    def post(self, event: str, data: Any) -> None:
        """From the thread: tells the client something; ``result`` and ``error`` are the last."""
        if self.left:
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (event, data))
        except RuntimeError:  # the loop has ended with its clients
            self.cancel()

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """What happens, until the ``result``.

        Raises:
          Late: the deadline has passed.
          JmlrError: the request's own error.
        """
        try:
            while True:
                try:
                    async with asyncio.timeout_at(self.deadline):
                        event, data = await self._events.get()
                except TimeoutError:
                    raise Late("took too long; ask again, or something shorter") from None
                if event == "error":
                    raise data
                yield event, data
                if event == "result":
                    return
        finally:
            self.cancel()

    async def result(self) -> Any:
        """The result alone; errors as :meth:`events`."""
        async for event, data in self.events():
            if event == "result":
                return data
        raise Failed("ended without a result")


class Desk:
    """Takes requests, and lets one thread answer them.

    Args:
      engine: not opened yet; the thread opens it.
      capacity: requests that wait, at most.
      timeout: seconds until a request is given up.
      metrics: what is counted.
      log_questions: whether what is asked goes to the log.
    """

    def __init__(self, engine: Engine, capacity: int, timeout: float, metrics: Metrics, log_questions: bool = False):
        self.log_questions = log_questions
        self.engine, self.capacity, self.timeout, self.metrics = engine, capacity, timeout, metrics
        self.state, self.done, self.of = "opening the models", 0, 1
        self.ready, self.fault = False, ""
        self._waiting: deque[Ticket] = deque()
        self._some = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begins to open the models, then to answer."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Answers nothing more; waits so long for what is being computed."""
        with self._some:
            self._stopped = True
            self._some.notify_all()
        self._thread.join(seconds)

    @property
    def computing(self) -> bool:
        """Whether the thread is still at work; asked after :meth:`stop`."""
        return self._thread.is_alive()

    def submit(self, work: Work) -> Ticket:
        """Takes a request of the running loop.

        Raises:
          Loading: models are not open yet.
          Full: too many wait.
          JmlrError: the models could not be opened.
        """
        if self.fault:
            raise Failed(self.fault)
        if not self.ready or self._stopped:
            raise Loading(self.state)
        if self.log_questions and isinstance(work, Asked):
            LOG.info(
                "asked %s: %s", work.arm, json.dumps([work.question, *work.options])
            )  # one line, whatever it holds
        with self._some:
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.left)
            if len(self._waiting) >= self.capacity:
                raise Full(f"{self.capacity} requests are waiting already; try again in a moment")
            ticket = Ticket(work, self.timeout)
            self._waiting.append(ticket)
            self.metrics.waiting.set(len(self._waiting))
            self._some.notify()
        return ticket

    def _run(self) -> None:
        try:
            self.engine.open(self._told)
        except Exception as error:
            LOG.error("the models could not be opened: %s", error, exc_info=not isinstance(error, JmlrError))
            self.fault = str(error) if isinstance(error, JmlrError) else "the models could not be opened; see the log"
            return
        self.metrics.opened()
        self.ready = True
        LOG.info("ready")
        while group := self._next():
            self.metrics.together.observe(len(group))
            self._serve(group)
        for ticket in self._waiting:
            ticket.post("error", Loading("the server is being stopped"))

    def _told(self, what: str, done: int, of: int) -> None:
        self.state, self.done, self.of = what, done, of

    def _next(self) -> list[Ticket]:
        """The next request, and those that can be answered with it; none when the server stops."""
        with self._some:
            while True:
                if self._stopped:
                    return []
                waiting = [ticket for ticket in self._waiting if not ticket.left]
                if waiting:
                    break
                self._waiting.clear()
                self._some.wait()
            arm = waiting[0].work.arm if isinstance(waiting[0].work, Asked) else None
            group = [t for t in waiting if arm is not None and isinstance(t.work, Asked) and t.work.arm == arm]
            group = group[: ROWS[-1]] or waiting[:1]
            self._waiting = deque(ticket for ticket in waiting if not any(ticket is each for each in group))
            self.metrics.waiting.set(len(self._waiting))
            return group

    def _serve(self, group: Sequence[Ticket]) -> None:
        started = time.monotonic()
        try:
            for ticket, found in zip(group, self._found(group), strict=True):
                failed = isinstance(found, JmlrError)
                ticket.post("error" if failed else "result", found)
        except Exception:
            if len(group) > 1:  # whose fault it is shows when each is alone
                for ticket in group:
                    self._serve([ticket])
                return
            LOG.exception("a request failed")
            group[0].post("error", Failed("a fault of this server; its log says more"))
        self.metrics.computing.observe(time.monotonic() - started)

    def _found(self, group: Sequence[Ticket]) -> Sequence[Any]:
        works = [ticket.work for ticket in group]
        asked = [work for work in works if isinstance(work, Asked)]
        if not asked:
            (work,) = works
            assert not isinstance(work, Asked)
            try:
                return [work(self.engine)]
            except JmlrError as error:
                return [error]

        def told(number: int, event: str, data: Any) -> None:
            if event != "answer":
                group[number].post(event, data)

        found: list[Answer | JmlrError] = self.engine.answer_all(
            asked, told, lambda number: group[number].left or self._stopped
        )
        return found
