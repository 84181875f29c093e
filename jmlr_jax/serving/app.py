"""The application: routes, the guard around them, and what is counted of every request."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from importlib import metadata, resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jmlr_jax.serving.api import Api
from jmlr_jax.serving.desk import Desk
from jmlr_jax.serving.guard import App, Guard, Message, Receive, Scope, Send, refusal
from jmlr_jax.serving.openapi import description
from jmlr_jax.serving.pages import Pages

LOG = logging.getLogger("jmlr.serve")
STOP_SECONDS = 5.0  # for what is being computed when the server stops
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".txt": "text/plain"}


def application(desk: Desk, hosts: Collection[str], token: str | None) -> App:
    """Everything that `jmlr serve` answers.

    Args:
      desk: not started yet; it starts and stops with the application.
      hosts, token: see :class:`jmlr_jax.serving.guard.Guard`.
    """
    api, pages = Api(desk), Pages(desk)
    described = description(metadata.version("jmlr_jax"), token is not None)
    stored = _static()

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def static(request: Request) -> Response:
        found = stored.get(request.path_params["name"])
        return Response(found[0], media_type=found[1]) if found else await missing(request)

    async def missing(request: Request, error: Exception | None = None) -> Response:
        if request.url.path.startswith("/v1/"):
            return refusal(404, "missing", "no such endpoint; /openapi.json lists all")
        return pages.missing("Not here", "There is no page of this address.", 404)

    async def method(request: Request, error: Exception) -> Response:
        return refusal(405, "method", f"{request.method} is not understood here")

    async def fault(request: Request, error: Exception) -> Response:
        return refusal(500, "failed", "a fault of this server; its log says more")

    routes = [
        Route("/", pages.home),
        Route("/ask", pages.ask),
        Route("/ask/stream", pages.stream),
        Route("/corpus", pages.corpus),
        Route("/static/{name}", static),
        Route("/v1/answer", api.answer, methods=["POST"]),
        Route("/v1/search", api.search, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/healthz", api.health),
        Route("/metrics", api.metrics),
        Route("/openapi.json", openapi),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        desk.start()
        yield
        desk.stop(STOP_SECONDS)

    handlers: dict[Any, Any] = {404: missing, 405: method, 500: fault}
    inner = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    known = {route.path for route in routes}
    return Counted(Guard(inner, hosts, token, pages.entrance), desk, known)


class Counted:
    """Counts requests by route and status, and logs them without what they ask."""

    def __init__(self, app: App, desk: Desk, known: Collection[str]):
        self.app, self.desk, self.known = app, desk, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            path = scope["path"]
            route = path if path in self.known else "/static/{name}" if path.startswith("/static/") else "other"
            seconds = time.monotonic() - started
            self.desk.metrics.requests.labels(route, str(status)).inc()
            self.desk.metrics.latency.labels(route).observe(seconds)
            LOG.info("%s %s %s %.3f s", scope["method"], route, status, seconds)


def _static() -> Mapping[str, tuple[bytes, str]]:
    """Files that pages load, by name: content and kind."""
    folder = resources.files("jmlr_jax.serving") / "static"
    found = {}
    for file in folder.iterdir():
        kind = next((kind for end, kind in KINDS.items() if file.name.endswith(end)), None)
        if kind is not None:
            found[file.name] = (file.read_bytes(), kind)
    return found
