"""`jmlr serve`: the process that listens."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from jmlr_jax.answering.engine import Engine
from jmlr_jax.answering.home import open_home
from jmlr_jax.config import Config
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import local_path

LEAST_TOKEN = 16  # characters
HEADER_SECONDS = 10.0  # until a connection must have said what it asks
KEEP_SECONDS = 15  # that a connection may stay without a request
STOP_SECONDS = 15  # for clients that are being answered when the server stops


class ServeError(JmlrError):
    """A server that cannot be started as asked."""


@dataclass(frozen=True)
class Settings:
    """How to serve; see ``jmlr serve --help``."""

    host: str = "127.0.0.1"
    port: int = 8000
    arms: tuple[str, ...] | None = None
    token_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    queue: int = 32
    timeout: float = 60.0
    log_questions: bool = False


def run_server(cfg: Config, settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what is under way and ends.

    The address stands alone on standard output once it listens; models load behind it.

    Args:
      cfg: its run directory is a run, or what ``jmlr export --with-index`` wrote.

    Raises:
      ServeError: the extra ``serve`` is not installed; an address that needs a token; a port that is taken.
      JmlrError: no run, no index, no such arm.
    """
    try:
        import uvicorn

        from jmlr_jax.serving.app import application
        from jmlr_jax.serving.desk import Desk
        from jmlr_jax.serving.metrics import Metrics
    except ImportError as error:
        raise ServeError(
            f"`jmlr serve` needs {error.name}, of the extra `serve`: .venv/bin/python -m pip install -e '.[serve]'"
        ) from None
    _check(settings)
    token = None if settings.token_file is None else read_token(settings.token_file)
    if token is None and not _is_loopback(settings.host):
        raise ServeError(
            f"--host {settings.host}: others can reach it, so clients must have a token; give --token-file FILE"
        )
    _log()
    engine = Engine(open_home(cfg), settings.arms)
    for name in engine.arms:
        if name not in engine.home.arms:
            raise ServeError(f"--arm {name}: is not here; there are {', '.join(engine.home.arms)}")
    desk = Desk(engine, settings.queue, settings.timeout, Metrics(), settings.log_questions)
    hosts = {settings.host, "localhost", "127.0.0.1", "::1", *settings.allowed_hosts}
    with _listening(settings.host, settings.port) as listening:
        config = uvicorn.Config(
            application(desk, hosts, token),
            http=_protocol(),
            ws="none",
            loop="asyncio",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _heard)  # uvicorn stops by them, and raises them again once it has stopped
        uvicorn.Server(config).run(sockets=[listening])
    if desk.computing:
        # Models still load, or an answer takes longer than a stop waits for it. XLA aborts the process where Python
        # ends under a thread that compiles.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def read_token(file: str) -> str:
    """The token of a file, white space around it left out.

    Raises:
      ServeError: no such file, a short token, or characters that no header carries.
    """
    try:
        token = local_path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--token-file {file}: cannot be read ({error})") from None
    plain = token.isascii() and token.isprintable() and not set(token) & set(' ,;"\\&=+%')
    if len(token) < LEAST_TOKEN or not plain:
        raise ServeError(
            f"--token-file {file}: give {LEAST_TOKEN} letters and digits or more, such as `openssl rand -hex 32` writes"
        )
    return token


def _check(settings: Settings) -> None:
    for name, value, least, most in (
        ("port", settings.port, 0, 65535),
        ("queue", settings.queue, 1, 10_000),
        ("timeout", settings.timeout, 1, 3600),
    ):
        if not least <= value <= most:
            raise ServeError(f"--{name} {value}: give a number from {least} to {most}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        raise ServeError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return found


def _log() -> None:
    """What the server says of itself goes to standard error, a line for each request."""
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("jmlr.serve")
    log.handlers, log.propagate = [said], False
    log.setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves early


def _heard(number: int, frame: Any) -> None:
    """The server has been told to stop already."""


def _protocol() -> Any:
    """HTTP/1.1 that gives a connection up which does not say in time what it asks."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Timed(H11Protocol):
        """See :func:`_protocol`."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(HEADER_SECONDS, self._check)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE and self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(HEADER_SECONDS, self._check)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """What is answering a request that turned out to be none sends nothing more: one response is the most."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.close()

        def _check(self) -> None:
            self._timer = None
            answering = self.cycle is not None and not self.cycle.response_complete
            if not answering and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Timed
