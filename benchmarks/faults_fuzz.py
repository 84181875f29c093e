"""Input that nobody wrote: mutated files of every kind that is read, in one process."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_inputs import TARGETS, Lost
from faults_run import record, recorded

BLOCK = 200  # inputs between two lines of the record
SECONDS = 20  # after which an input counts as hanging
WORDS = (
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\t",
        b"\n",
        b"\r\n",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
    ),
    *(b"\\ud800", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 40, b"9" * 5000, b"[" * 30_000, b'{"a":' * 5000),
    *(
        b"!!python/object:os.system",
        b"&a [*a]",
        b"*a",
        b"<<: *a",
        b"../",
        b"\x1b[31m",
        b"#",
        b"'",
        b"~",
        b"$HOME",
        b"%s",
    ),
)


class Hangs(Exception):
    """An input took too long."""


def fuzz(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """So many inputs, the targets in turn; see the campaign."""
    done = recorded(folder / "fuzz.jsonl")
    place = folder / "inputs"
    place.mkdir(exist_ok=True)
    signal.signal(signal.SIGALRM, _alarm)
    targets = {name: make(place) for name, make in TARGETS.items()}
    for block in range(-(-count // BLOCK)):
        if block in done:
            continue
        found: dict[str, dict[str, int]] = {}
        problems = []
        for number in range(block * BLOCK, min((block + 1) * BLOCK, count)):
            name = list(targets)[number % len(targets)]
            end, said = _one(random.Random(f"{seed} {number}"), *targets[name])
            counted = found.setdefault(name, {})
            counted[end] = counted.get(end, 0) + 1
            if end not in ("accepted", "refused"):
                problems.append({"number": number, "target": name, "end": end, "said": said[:400]})
                print(problems[-1], flush=True)
        done[block] = {"number": block, "found": found, "problems": problems}
        record(folder / "fuzz.jsonl", done[block])
    table: dict[str, dict[str, int]] = {}
    for row in done.values():
        for name, counted in row["found"].items():
            for end, number in counted.items():
                table.setdefault(name, {})[end] = table.get(name, {}).get(end, 0) + number
    problems = [problem for row in done.values() for problem in row["problems"]]
    total = sum(number for counted in table.values() for number in counted.values())
    return {"inputs": total, "by_target": table, "problems": problems, "lost": len(problems)}


def _one(rng: random.Random, sample: bytes, act: Callable[[bytes], None]) -> tuple[str, str]:
    """Mutates a sample and gives it to its reader; how that ended."""
    from jmlr_jax.errors import JmlrError

    content = mutated(rng, sample)
    signal.alarm(SECONDS)
    try:
        act(content)
    except JmlrError as error:
        return ("refused", "") if str(error).strip() else ("silent", "an error without a word")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return "refused", ""  # a path that was mutated: the command line says what the system says
    except Hangs:
        return "hang", repr(content[:200])
    except Lost as lost:
        return "silent", str(lost)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "accepted", ""


def mutated(rng: random.Random, sample: bytes) -> bytes:
    """A sample with one to three changes."""
    content = bytearray(sample)
    for _ in range(rng.randint(1, 3)):
        at, way = rng.randrange(len(content) + 1), rng.randrange(7)
        end = min(len(content), at + rng.randint(1, 40))
        if way == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del content[at:end]
        elif way == 2:
            content[at:at] = content[at:end]
        elif way == 3:
            content[at:end] = rng.choice(WORDS)
        elif way == 4:
            content[at:at] = rng.choice(WORDS)
        elif way == 5:
            lines = bytes(content).split(b"\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            content = bytearray(b"\n".join(lines))
        else:
            del content[at:]
    return bytes(content)


def _alarm(*_: object) -> None:
    raise Hangs
