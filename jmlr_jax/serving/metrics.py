"""What is counted while serving, as Prometheus reads it. Nothing of what is asked is in it."""

from __future__ import annotations

from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """Counters of one server.

    Attributes:
      requests: by ``route`` (a pattern, never what a client wrote) and ``status``.
      latency: seconds from a request to its answer, by ``route``.
      waiting: requests in the queue.
      together: requests that were computed in one batch.
      computing: seconds of a batch.
      compilations: by ``when``: ``opening`` or ``serving``; the latter stays 0.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: Any = {"registry": self.registry, "namespace": "jmlr"}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **more)
        self.latency = Histogram("request_seconds", "Seconds to an answer.", ["route"], buckets=SECONDS, **more)
        self.waiting = Gauge("waiting", "Requests in the queue.", **more)
        self.together = Histogram("batch_requests", "Requests in a batch.", buckets=(1, 2, 4, 8), **more)
        self.computing = Histogram("batch_seconds", "Seconds of a batch.", buckets=SECONDS, **more)
        self.compilations = Counter("compilations", "Programs compiled.", ["when"], **more)
        self._when = "opening"
        for when in ("opening", "serving"):
            self.compilations.labels(when)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def opened(self) -> None:
        """From now on nothing should be compiled."""
        self._when = "serving"

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            self.compilations.labels(self._when).inc()
