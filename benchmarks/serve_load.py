"""32 clients for two minutes, then 2,000 broken requests: errors, memory, hangs, tracebacks, markup that escapes.

    python benchmarks/serve_load.py RUN [--seconds 120] [--broken 2000] [--json FILE] [arguments of jmlr serve]

Exits with 1 where anything but 200 and 429 came under load, memory grew by a tenth, or a broken request got anything
but an answer that says so.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import httpx
from serve_latency import Server, examples, write

CLIENTS = 32
MARK = "<zz-evil>"
LETTERS = "abc <>&\"'%\x00\x07\n\t{}[]\\/\u00e9\u6f22\U0001f600\u202e\ufeff"


def load(server: Server, seconds: float) -> dict[str, object]:
    """Statuses and memory under load."""
    bodies, until, memory = examples(server.url), time.monotonic() + seconds, []
    counts: Counter[int | str] = Counter()

    def client(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=120) as asks:
            while time.monotonic() < until:
                try:
                    status: int | str = asks.post("/v1/answer", json=rng.choice(bodies)).status_code
                except httpx.HTTPError as error:
                    status = repr(error)
                counts[status] += 1
                if status == 429:
                    time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(min(20.0, seconds / 4))  # until every size of a batch has been seen
    while any(thread.is_alive() for thread in threads):
        memory.append(server.memory())
        time.sleep(2)
    held = {"memory_first_mib": memory[0], "memory_last_mib": memory[-1], "memory_most_mib": max(memory)}
    return {"seconds": seconds, "statuses": dict(counts), **held}


def broken(server: Server, count: int) -> dict[str, object]:
    """What comes back to requests that no client should send."""
    host, port = server.url.removeprefix("http://").split(":")
    faults: list[str] = []
    statuses: Counter[str] = Counter()

    def text(rng: random.Random) -> str:
        made = "".join(rng.choice(LETTERS) for _ in range(rng.choice((0, 3, 40, 400, 4000))))
        return made + MARK if rng.random() < 0.5 else made

    def over_http(rng: random.Random, client: httpx.Client) -> httpx.Response:
        kind, said = rng.randrange(6), text(rng)
        head = {"content-type": "application/json"}
        if kind == 0:
            return client.get("/ask", params={"q": said, "options": text(rng), "arm": rng.choice(("jmlr", said))})
        if kind == 1:
            return client.get("/ask/stream", params={"q": said, "options": f"{said}\na\nb", "k": said})
        if kind == 2:
            body = {
                "question": said,
                "options": [text(rng) for _ in range(rng.randrange(12))],
                "k": rng.choice((1, -1, 10**400)),
            }
            return client.post("/v1/answer", content=json.dumps(body).encode(), headers=head)
        if kind == 3:
            return client.post("/v1/search", content=rng.randbytes(rng.choice((0, 9, 900, 90_000))), headers=head)
        if kind == 4:
            path = rng.choice(("/static/", "/static/%2e%2e/", "/static/..%2f..%2f", "/../../", "/%00/", "/v1/"))
            return client.get(path + rng.choice(("etc/passwd", "server.py", "%2fetc%2fpasswd", "%ff%fe")))
        return client.request(
            rng.choice(("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "POST")), "/v1/answer", content=b"x"
        )

    def raw(rng: random.Random) -> str:
        junk = rng.choice(
            (
                rng.randbytes(200),
                b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\nContent-Length: 11\r\n\r\n",
                b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 50\r\n\r\n{",
                b"GET /" + b"a" * rng.choice((10, 70_000)) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
                b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            )
        )
        with socket.create_connection((host, int(port)), timeout=30) as line:
            try:
                for first in range(0, len(junk), max(1, len(junk) // rng.choice((1, 5)))):
                    line.sendall(junk[first : first + max(1, len(junk) // 5)])
                return line.recv(64).split(b"\r\n")[0].decode("latin-1") or "closed"
            except (ConnectionError, BrokenPipeError):
                return "closed"

    def one(number: int) -> None:
        rng = random.Random(number)
        try:
            if number % 5 == 0:
                said = raw(rng)
                statuses[said.split(" ")[1] if " " in said else said] += 1
                return
            with httpx.Client(base_url=server.url, timeout=60) as client:
                answer = over_http(rng, client)
            statuses[str(answer.status_code)] += 1
            if answer.status_code >= 500 and answer.status_code not in (503, 504):
                faults.append(f"{number}: {answer.status_code}")
            if MARK in answer.text and "html" in answer.headers.get("content-type", ""):
                faults.append(f"{number}: markup came through")
            if MARK in answer.text and "event-stream" in answer.headers.get("content-type", ""):
                faults.append(f"{number}: markup came through a stream")
        except httpx.HTTPError as error:
            faults.append(f"{number}: {error!r}")
        except TimeoutError:
            faults.append(f"{number}: hangs")
        except OSError as error:
            faults.append(f"{number}: {error!r}")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(count)))
    return {"count": count, "statuses": dict(sorted(statuses.items())), "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--broken", type=int, default=2000)
    parser.add_argument("--json")
    args, words = parser.parse_known_args()
    log = Path(tempfile.mkdtemp()) / "serve_load.log"
    with Server(args.run, *words, log=str(log)) as server:
        under_load = load(server, args.seconds)
        print("load:", under_load, flush=True)
        fuzzed = broken(server, args.broken)
        print("broken:", fuzzed)
        alive = httpx.get(f"{server.url}/healthz").status_code
    tracebacks = log.read_text().count("Traceback")
    found = {
        "date": str(date.today()),
        "serve": words,
        "load": under_load,
        "broken": fuzzed,
        "alive": alive,
        "tracebacks": tracebacks,
    }
    if args.json:
        write(args.json, found)
    grown = float(str(under_load["memory_last_mib"])) / float(str(under_load["memory_first_mib"]))
    bad = set(under_load["statuses"]) - {200, 429}  # type: ignore[call-overload]
    print(f"tracebacks {tracebacks} ({log}), memory x {grown:.3f}, after all: {alive}")
    sys.exit(bool(bad or grown > 1.1 or fuzzed["faults"] or tracebacks or alive != 200))


if __name__ == "__main__":
    main()
