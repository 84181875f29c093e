"""How long an answer takes, and how many come a second with 1, 8 and 32 clients, from a real server.

    python benchmarks/serve_latency.py RUN [--requests 200] [--json FILE] [arguments of jmlr serve]

Questions are those of RUN's test set, with their options, answered by its first arm. Processor time is told too: what
else the machine does changes it less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import httpx
import numpy as np

CLIENTS = (1, 8, 32)


class Server:
    """`jmlr serve` on a free port while the block lasts.

    Attributes:
      url: where it listens; what it says goes to the file `log`.
      opening, opening_cpu: seconds until it was ready, of the clock and of processors.
    """

    def __init__(self, run: str, *words: str, log: str = os.devnull):
        command = [sys.executable, "-m", "jmlr_jax", "serve", "--run-dir", run, "--port", "0", *words]
        started = time.monotonic()
        with open(log, "w") as said:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            sys.exit(f"{' '.join(command)} did not start")
        while (status := httpx.get(f"{self.url}/healthz", timeout=60).status_code) != 200:
            if status != 503:
                self.process.kill()
                sys.exit(f"{' '.join(command)} failed to open its models")
            time.sleep(0.2)
        self.opening, self.opening_cpu = time.monotonic() - started, self.cpu()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def memory(self) -> float:
        """MiB that it holds."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))

    def cpu(self) -> float:
        """Seconds that processors have worked for it."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            user, kernel = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")


def examples(url: str) -> list[dict[str, object]]:
    """Questions that the page offers, as bodies of requests."""
    import html
    import re
    from urllib.parse import parse_qs, urlsplit

    links = re.findall(r'<li><a href="([^"]+)"', httpx.get(url).text)
    asked = [parse_qs(urlsplit(html.unescape(link)).query) for link in links]
    return [
        {"question": a["q"][0], "options": a.get("options", [""])[0].splitlines(), "arm": a["arm"][0]} for a in asked
    ]


def write(path: str, found: dict[str, object]) -> None:
    """Writes what was measured, to four digits."""
    short = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}"))
    with open(path, "w") as file:
        file.write(json.dumps(short, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--json")
    args, words = parser.parse_known_args()
    rows, load = [], os.getloadavg()[0]
    with Server(args.run, *words) as server:
        bodies = examples(server.url)

        def ask(number: int) -> float:
            body = bodies[number % len(bodies)]
            started = time.monotonic()
            while (status := httpx.post(f"{server.url}/v1/answer", json=body, timeout=300).status_code) == 429:
                time.sleep(0.05)
            assert status in (200, 504), status
            return time.monotonic() - started if status == 200 else float("nan")  # it waited longer than it may

        ask(0)
        for clients in CLIENTS:
            started, cpu = time.monotonic(), server.cpu()
            with ThreadPoolExecutor(clients) as pool:
                seconds = list(pool.map(ask, range(args.requests)))
            late = sum(map(math.isnan, seconds))
            p50, p95 = np.nanpercentile(seconds, (50, 95))
            rate = (args.requests - late) / (time.monotonic() - started)
            cpu = (server.cpu() - cpu) / args.requests
            rows.append({"clients": clients, "p50_s": p50, "p95_s": p95, "per_s": rate, "cpu_s": cpu, "late": late})
            times = f"p50 {1000 * p50:.0f} ms, p95 {1000 * p95:.0f} ms, {1000 * cpu:.0f} ms of processors"
            print(f"{clients:>3} clients: {times}, {rate:.1f} a second, {late} timed out", flush=True)
        found: dict[str, object] = {
            "date": str(date.today()),
            "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            "load_before": load,
        }
        found |= {"opening_s": server.opening, "opening_cpu_s": server.opening_cpu, "memory_mib": server.memory()}
    found |= {"serve": words, "questions": len(bodies), "requests": args.requests, "rows": rows}
    print(f"opened in {server.opening:.1f} s, {server.opening_cpu:.1f} of processors; {found['memory_mib']} MiB")
    if args.json:
        write(args.json, found)


if __name__ == "__main__":
    main()
