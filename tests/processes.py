"""Jobs of several local processes: the command line started once for each, as on the workers of a slice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540  # until a job that hangs is ended; pytest's own limit comes after it


def environment() -> dict[str, str]:
    """Of a process with one CPU device that compiles quickly; what has been compiled is shared (``conftest``)."""
    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


class Job:
    """``python -m jmlr_jax WORDS --distributed ...`` in so many processes with one CPU device each; ends them on exit.

    Args:
      folder: for the output of each process.
      words: the command.
    """

    def __init__(self, folder: Path, count: int, *words: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        self.outputs = [folder / f"process_{i}.txt" for i in range(count)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            command = [sys.executable, "-m", "jmlr_jax", *words, "--distributed", f"{where},{i},{count}"]
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)
                )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def said(self) -> str:
        """What each process wrote, for the message of a failure."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.outputs)

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits for something, or for the end of a process."""
        limit = time.monotonic() + SECONDS
        while not happened() and all(process.poll() is None for process in self.processes):
            assert time.monotonic() < limit, self.said()
            time.sleep(0.01)

    def statuses(self) -> list[int]:
        """Exit statuses, once all have ended."""
        limit = time.monotonic() + SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a job of {len(self.processes)} did not end\n{self.said()}") from None
        return [process.returncode for process in self.processes]

    def last_words(self) -> list[str]:
        """What each process has said once all have ended; that of a killed one is said for it, a moment later."""
        time.sleep(1)
        return [path.read_text() for path in self.outputs]

    def succeeds(self) -> None:
        """Waits for the end; fails unless all processes ended well."""
        assert set(self.statuses()) == {0}, self.said()
