"""What stands between the network and the application: who may ask, how much at once, and what a browser may do.

* Only names that the server was given are answered (a page elsewhere cannot reach it by a name of its own).
* With a token, whoever has it not is refused; browsers keep it in a cookie that no other site can send.
* What is posted comes from programs or from this server's own pages, never from another site, in small bodies that
  arrive in time. A body is read whole before anything sees it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from jmlr_jax.errors import JmlrError

LOG = logging.getLogger("jmlr.serve")
MAX_BODY = 64 * 1024  # bytes
MAX_TARGET = 48 * 1024  # bytes of path and query
BODY_SECONDS = 10.0
COOKIE = "jmlr_token"
OPEN_PATHS = ("/healthz", "/enter", "/static/")  # without a token
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Refused(JmlrError):
    """A request that goes no further."""

    def __init__(self, status: int, code: str, why: str):
        super().__init__(why)
        self.status, self.code = status, code


class Guard:
    """Wraps an application.

    Args:
      hosts: names that clients may call the server by, without port.
      token: what they must have; None: nothing.
      entrance: answers browsers that have no token with a page to give it.
    """

    def __init__(self, app: App, hosts: Collection[str], token: str | None, entrance: Callable[[bool], Response]):
        self.app, self.hosts, self.token, self.entrance = app, {host.lower() for host in hosts}, token, entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a web socket; nothing here speaks so
        request = Request(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_headers(scope["path"])]
            await send(message)

        try:
            response = await self._admit(request, receive)
        except _Refused as refused:
            response = refusal(refused.status, refused.code, str(refused))
        if isinstance(response, Response):
            await response(scope, receive, guarded)
        else:
            await self.app(scope, response, guarded)

    async def _admit(self, request: Request, receive: Receive) -> Response | Receive:
        """What the application may read the request from; or what the request gets instead."""
        scope = request.scope
        if len(scope["raw_path"] or b"") + len(scope["query_string"]) > MAX_TARGET:
            raise _Refused(414, "target_too_long", "the address is too long")
        self._check_host(request)
        if request.method not in ("GET", "HEAD", "POST"):
            raise _Refused(405, "method", f"{request.method} is not understood here")
        if request.method == "POST":
            self._check_origin(request)
            body = await _body(request, receive)
            if self.token is not None and scope["path"] == "/enter":
                return self._enter(request, body)
            receive = _replayed(body, receive)
        if self.token is not None and not scope["path"].startswith(OPEN_PATHS) and not self._has_token(request):
            if "text/html" in request.headers.get("accept", ""):
                return self.entrance(False)
            raise _Refused(401, "token", "a token is needed: Authorization: Bearer ...")
        if self.token is not None and scope["path"] == "/enter":
            return self.entrance(False)
        return receive

    def _check_host(self, request: Request) -> None:
        found = request.headers.getlist("host")
        name = found[0].strip().lower() if len(found) == 1 else ""
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        if name.strip("[]") not in self.hosts:
            raise _Refused(421, "host", "this server does not answer by that name (--allow-host NAME adds one)")

    def _check_origin(self, request: Request) -> None:
        """A browser says where a post comes from; programs say nothing."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        own = (f"http://{request.headers['host']}", f"https://{request.headers['host']}")
        if (origin is not None and origin.lower() not in [each.lower() for each in own]) or site in (
            "cross-site",
            "same-site",
        ):
            raise _Refused(403, "cross_site", "posts from other sites are refused")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form = request.scope["path"] == "/enter"
        if kind != ("application/x-www-form-urlencoded" if form else "application/json"):
            raise _Refused(415, "content_type", "send JSON, with content-type: application/json")

    def _has_token(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._right(given.strip()):
            return True
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._right(cookie.value)

    def _right(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _enter(self, request: Request, body: bytes) -> Response:
        """A browser gives the token once."""
        given = body.decode("utf-8", "replace").removeprefix("token=")
        if not self._right(given):
            return self.entrance(True)
        response = RedirectResponse("/", status_code=303)
        secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        response.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=secure)
        return response


def refusal(status: int, code: str, why: str, more: dict[str, str] | None = None) -> Response:
    """An error as a client gets it: ``{"error": {"code", "message"}}``."""
    return JSONResponse({"error": {"code": code, "message": why}}, status_code=status, headers=more)


def _headers(path: str) -> list[tuple[bytes, bytes]]:
    stored = "max-age=86400" if path.startswith("/static/") else "no-store"
    named = {**HEADERS, "cache-control": stored}
    return [(name.encode(), value.encode()) for name, value in named.items()]


async def _body(request: Request, receive: Receive) -> bytes:
    """The body of a request, whole, bounded, in time."""
    said = request.headers.get("content-length", "0")
    if not said.isascii() or not said.isdecimal() or len(said) > 15 or int(said) > MAX_BODY:
        raise _Refused(413, "too_large", f"a body may have {MAX_BODY} bytes")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Refused(400, "left", "the client has left")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY:
                    raise _Refused(413, "too_large", f"a body may have {MAX_BODY} bytes")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise _Refused(408, "slow", f"the body did not arrive within {BODY_SECONDS:.0f} s") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body again, then whatever comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
