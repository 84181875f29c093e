"""Damages to every kind of file that a run holds, one at a time."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

from faults_run import SETTINGS, outcome, quickly, record, recorded, told

WAYS = ("truncate", "flip", "swap", "delete", "another's")
# Kind of file: where its files are, and the command that reads it. Those of `middle` are of a run within training.
KINDS = {
    "data": ("data/**/*", "train"),
    "checkpoint": ("arms/jmlr/checkpoints/**/*", "train"),
    "table": ("arms/jmlr/tables/*", "train"),
    "metrics": ("arms/jmlr/*.json*", "train"),
    "weights": ("arms/jmlr/weights/**/*", "eval"),
    "sums": ("arms/jmlr/checks.json", "eval"),
    "index": ("index/**/*", "search"),
    "evaluation": ("eval/**/*", "report"),
    "configuration": ("*.yaml", "eval"),
    "timing": ("timing.json", "eval"),
}
CLOCK = ("speed.jsonl", "cost.json", "timing.json")  # what a clock measured: no number that a run ends with
TRIED = ("tensorboard", "profile", "report", "risk", "reliability", "accuracy", "training", "retriever.png")


def damages(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """So many damages, the kinds in turn; see the campaign."""
    quickly()
    done = recorded(folder / "damages.jsonl")
    wanted = _runs(folder)
    for number in range(count):
        if number not in done:
            kind = list(KINDS)[number % len(KINDS)]
            done[number] = {"number": number, "kind": kind, **_one(folder, kind, f"{seed} {number}", wanted)}
            record(folder / "damages.jsonl", done[number])
            if done[number]["end"] == "lost":
                print(done[number], flush=True)
    rows = [done[number] for number in range(count)]
    ends = ("refused", "exact", "lost")
    table = {
        kind: {end: sum((row["kind"], row["end"]) == (kind, end) for row in rows) for end in ends} for kind in KINDS
    }
    ways = {way: sum(row["way"] == way for row in rows) for way in WAYS}
    problems = [row for row in rows if row["end"] == "lost"]
    return {"damages": len(rows), "by_kind": table, "by_way": ways, "problems": problems, "lost": len(problems)}


def _runs(folder: Path) -> dict[str, Any]:
    """A finished run, one within training, and another one; what the first ends with."""
    for name, more in (("whole", ()), ("other", ("seed=1",))):
        run = folder / name
        if (run / "eval").exists():
            continue
        shutil.rmtree(run, ignore_errors=True)
        for command in (["prepare", *SETTINGS, "train.keep_last=3", *more], ["index"], ["train"], ["index"], ["eval"]):
            status, said, _ = told([command[0], "--run-dir", str(run), *command[1:]])
            if status:
                raise SystemExit(f"jmlr {command[0]} ended with {status}: {said}")
    middle = folder / "middle"
    if not middle.exists():
        shutil.copytree(folder / "whole", folder / "middle.part")
        for left in ("arms/jmlr/weights", "arms/jmlr/checkpoints/36", "arms/jmlr/checkpoints/40", "eval"):
            shutil.rmtree(folder / "middle.part" / left)
        (folder / "middle.part").rename(middle)
    return outcome(folder / "whole")


def _one(folder: Path, kind: str, seed: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """One damage: which file, how, and how the command that reads it ended."""
    rng = random.Random(seed)
    pattern, command = KINDS[kind]
    run = folder / "hurt"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / ("middle" if command == "train" else "whole"), run)
    if command == "eval":
        shutil.rmtree(run / "eval")
    files = sorted(path for path in run.glob(pattern) if path.is_file() and path.name not in ("speed.jsonl",))
    file, way = rng.choice(files), rng.choice(WAYS)
    name = str(file.relative_to(run))
    _hurt(rng, folder, run, files, file, way)
    before = _content(run)
    status, said, printed = told(_words(command, run))
    row = {"file": name, "way": way, "said": said.strip().splitlines()[-1:], "status": status}
    if status == 2:
        plain = "Traceback" not in said and said.strip().splitlines()[-1].startswith("jmlr: ")
        now = _content(run)  # a step before the refused one may have added what is whole
        touched = [name for name, digest in before.items() if now.get(name) != digest]
        return row | {"end": "lost" if touched or not plain else "refused", "plain": plain, "touched": touched[:3]}
    found = outcome(run)
    same = status == 0 and all(found.get(key, value) == value for key, value in wanted.items())
    if command == "search":
        whole = told(_words(command, folder / "whole"))[2]
        same = status == 0 and printed == whole
        row |= {} if same else {"printed": printed[-300:], "whole": whole[-300:]}
    return row | {"end": "exact" if same else "lost"}


def _words(command: str, run: Path) -> list[str]:
    if command == "search":
        return ["search", "Which drug helps?", "--run-dir", str(run), "--arm", "jmlr", "--k", "5"]
    return [command, "--run-dir", str(run), *(["--out", str(run.parent / "reported")] if command == "report" else [])]


def _hurt(rng: random.Random, folder: Path, run: Path, files: list[Path], file: Path, way: str) -> None:
    """Damages a file."""
    content = bytearray(file.read_bytes())
    other = folder / "other" / file.relative_to(run)
    if way == "truncate":
        file.write_bytes(content[: rng.randrange(len(content) or 1)])
    elif way == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif way == "swap" and len(files) > 1:
        peer = rng.choice([path for path in files if path != file])
        file.write_bytes(peer.read_bytes())
        peer.write_bytes(content)
    elif way == "another's" and other.is_file():
        file.write_bytes(other.read_bytes())
    else:
        file.unlink()


def _content(run: Path) -> dict[str, str]:
    """Digests of a run's files by name; of those that belong to its numbers."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in CLOCK and not any(part.startswith(TRIED) for part in path.parts)
    }
