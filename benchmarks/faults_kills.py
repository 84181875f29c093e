"""Kills at random moments, in every stage of a run, by one process and by two."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from faults_run import STAGES, ended, job, outcome, quickly, record, recorded, start, words

KILLS = {"prepare": 3, "index": 3, "train": 6, "eval": 3, "export": 2}  # of a cycle by one process
TWO = {"index": 1, "train": 2, "eval": 1}  # and by two, on the same data


def kills(folder: Path, cycles: int, seed: int) -> dict[str, Any]:
    """So many cycles of kills; see the campaign."""
    quickly()
    done = recorded(folder / "kills.jsonl")
    wanted = _untouched(folder)
    for number in range(cycles):
        if number not in done:
            done[number] = {"number": number, **_cycle(folder, number, seed, wanted)}
            record(folder / "kills.jsonl", done[number])
            print(done[number], flush=True)
    rows = [done[number] for number in range(cycles)]
    by_stage: dict[str, int] = {}
    for row in rows:
        for stage, count in row["kills"].items():
            by_stage[stage] = by_stage.get(stage, 0) + count
    return {
        "kills": sum(by_stage.values()),
        "by_stage": by_stage,
        "ended_before_the_kill": sum(row["missed"] for row in rows),
        "different": [problem for row in rows for problem in row["different"]],
        "lost": sum(len(row["different"]) for row in rows),
    }


def _untouched(folder: Path) -> dict[int, dict[str, Any]]:
    """What runs that nobody kills end with, by number of processes, and how long stages take; kept in the folder."""
    found: dict[int, dict[str, Any]] = recorded(folder / "untouched.jsonl")
    for count in (1, 2):
        if count in found:
            continue
        run, seconds = folder / f"whole_{count}", {}
        if count == 2 and not (run / "data").exists():
            shutil.copytree(folder / "whole_1" / "data", run / "data")
            shutil.copy(folder / "whole_1" / "config.yaml", run / "config.yaml")
        for again in (False, True):  # the first compiles
            if again:
                for name in ("arms", "eval", "index", *(["data"] if count == 1 else [])):
                    shutil.rmtree(run / name, ignore_errors=True)
                shutil.rmtree(run.parent / f"{run.name} exported", ignore_errors=True)
            for stage in STAGES if count == 1 else TWO:
                began = time.monotonic()
                status = _act(folder, run, stage, count)
                if status:
                    raise SystemExit(f"{stage} of the untouched run ended with {status}; see {folder}/log.txt")
                seconds[stage] = time.monotonic() - began
        found[count] = {"number": count, "seconds": seconds, "outcome": outcome(run)}
        record(folder / "untouched.jsonl", found[count])
    return found


def _act(folder: Path, run: Path, stage: str, count: int) -> int:
    """A stage to its end; its worst status."""
    log, cache = folder / "log.txt", folder / "compiled"
    started = [start(words(stage, run), log, cache)] if count == 1 else job(words(stage, run), count, log, cache)
    return max((ended(process) for process in started), key=abs)


def _cycle(folder: Path, number: int, seed: int, wanted: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One run by one process and one by two, killed and continued in every stage."""
    rng = random.Random(f"{seed} {number}")
    counts: dict[str, int] = {}
    different: list[str] = []
    missed = 0
    for processes, plan in ((1, KILLS), (2, TWO)):
        run = folder / f"cycle_{number}_{processes}"
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run.parent / f"{run.name} exported", ignore_errors=True)
        if processes == 2:
            run.mkdir()
            shutil.copytree(folder / "whole_1" / "data", run / "data")
            shutil.copy(folder / "whole_1" / "config.yaml", run / "config.yaml")
        for stage in STAGES if processes == 1 else plan:
            took = None
            for _ in range(plan[stage]):
                lasts = wanted[processes]["seconds"]
                moment = rng.uniform(0, lasts[stage])
                took = _killed(folder, run, stage, processes, moment)
                if took is not None:  # it had ended: nothing is left to kill, and it is faster than was thought
                    missed += 1
                    lasts[stage] = max(took, lasts[stage] / 2)
                    break
                name = f"{stage} by {processes}"
                counts[name] = counts.get(name, 0) + 1
            if took is not None and stage == "export":
                continue  # a folder that is whole is not written again
            status = _act(folder, run, stage, processes)
            if status:
                different.append(f"cycle {number}, {stage} by {processes}: ended with {status}")
        found = outcome(run)
        for name, value in wanted[processes]["outcome"].items():
            if found.get(name) != value:
                different.append(f"cycle {number} by {processes}: {name} differs")
        if not different:
            shutil.rmtree(run)
            shutil.rmtree(run.parent / f"{run.name} exported", ignore_errors=True)
    return {"kills": counts, "missed": missed, "different": different}


def _killed(folder: Path, run: Path, stage: str, processes: int, moment: float) -> float | None:
    """Kills a stage so many seconds after its start; None, or how long it took if it had ended by then."""
    log, cache, began = folder / "log.txt", folder / "compiled", time.monotonic()
    one = processes == 1
    started = [start(words(stage, run), log, cache)] if one else job(words(stage, run), processes, log, cache)
    took = moment
    while time.monotonic() < began + moment and any(process.poll() is None for process in started):
        time.sleep(0.05)
        took = time.monotonic() - began
    for process in started:
        process.kill()
    return None if any(process.wait() == -signal.SIGKILL for process in started) else took
