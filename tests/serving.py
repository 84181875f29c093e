"""A real server in a process of its own, and what asks it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from processes import environment

LIMIT = 540  # seconds until a server that does not get ready is given up


class Server:
    """``jmlr serve`` on a free port, ended on exit.

    Args:
      run: directory of the run.
      folder: for its output.
      words: further arguments.
      wait: whether to wait until questions can be asked.
    """

    def __init__(self, run: Path, folder: Path, *words: str, wait: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "jmlr_jax", "serve", "--run-dir", str(run), "--port", "0", *words]
        # Another directory: nothing of the run may depend on where the command is given.
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.said()
        if wait:
            self.until_ready()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def said(self) -> str:
        return self.log.read_text()

    def until_ready(self) -> None:
        limit = time.monotonic() + LIMIT
        while (status := httpx.get(f"{self.url}/healthz", timeout=60).status_code) != 200:
            assert status == 503 and time.monotonic() < limit and self.process.poll() is None, self.said()
            time.sleep(0.2)

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **more)

    def counted(self, name: str) -> float:
        """A number of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name)))

    def stopped(self) -> int:
        """Exit status after SIGTERM."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.wait(60)
