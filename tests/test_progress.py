"""What long loops say: lines by the clock, a bar on a terminal, one loop at a time, process 0 alone."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from rich.console import Console

from jmlr_jax.parallel import distributed, progress
from jmlr_jax.parallel.progress import EVERY_SECONDS, FIRST_SECONDS, Stage, Tally, track
from jmlr_jax.training.metrics_log import MetricsLog

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed where there is no terminal."""
    return listen(monkeypatch, terminal=False)


def listen(monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool = False) -> io.StringIO:
    file, real = io.StringIO(), distributed.console

    def console() -> Console:
        made = real()
        made.file, made.quiet = file, quiet
        if not terminal:
            return made
        return Console(file=file, force_terminal=True, width=160, markup=False, emoji=False, highlight=False)

    monkeypatch.setattr(distributed, "console", console)
    return file


# Lines by the clock


def test_lines_come_first_after_a_few_seconds_and_then_every_so_many():
    tally = Tally("encoding", 1000, "passages", now=100.0)
    times = [100.0 + second for second in range(100) if tally.due(100.0 + second)]
    assert times == [100 + FIRST_SECONDS + i * EVERY_SECONDS for i in range(4)]


def test_a_line_tells_how_far_how_fast_and_how_long_still():
    tally = Tally("training jmlr", 1200, "steps", now=0.0, per=(4, "questions"))
    assert tally.due(5.0) == "training jmlr: 0 of 1,200 steps, 5 s so far"
    tally.update(1, "", now=34.0)  # compiled: no part of the rate
    tally.update(3, "answer loss 1.250", now=35.0)
    # 2 steps of 4 questions in 1 s; 1,197 steps at half a second are left
    assert tally.due(35.0) == "training jmlr: 3 of 1,200 steps, answer loss 1.250, 8.0 questions/s, 9 min 58 s left"
    tally.update(18, "", now=64.0)  # 15 steps in the 30 s since the last line
    assert tally.due(65.0) == "training jmlr: 18 of 1,200 steps, 2.0 questions/s, 39 min 24 s left"
    assert tally.due(95.0) == "training jmlr: 18 of 1,200 steps, 1 min 35 s so far"
    tally.update(1200, "answer loss 0.500", now=600.0)
    assert tally.last(600.0) == "training jmlr: 1,200 steps in 10 min 00 s, answer loss 0.500, 8.0 questions/s"


def test_what_an_earlier_run_did_counts_as_done_but_not_for_the_rate():
    tally = Tally("training", 30, "steps", now=0.0, done=10)
    tally.update(11, "", now=1.0)
    tally.update(15, "", now=3.0)
    assert tally.due(5.0) == "training: 15 of 30 steps, 1.0 steps/s, 15 s left"
    assert tally.last(5.0) == "training: 5 steps in 5 s, 1.0 steps/s"


# Where there is no terminal


def test_lines_are_plain_and_come_while_nothing_is_done(said, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    with Stage("loading [/INST] :pill:", 3, "weights") as stage:
        limit = time.monotonic() + 30
        while not said.getvalue() and time.monotonic() < limit:  # as during a compilation
            time.sleep(0.01)
        stage.update(3)
    first, last = said.getvalue().splitlines()
    assert re.fullmatch(r"loading \[/INST\] :pill:: 0 of 3 weights, \d+ s so far", first)
    assert last.startswith("loading [/INST] :pill:: 3 weights in ")


def test_long_lines_are_not_broken(said):
    with Stage("x" * 200, 1, "rows"):
        pass
    assert len(said.getvalue().splitlines()) == 1


def test_a_short_loop_says_nothing_and_a_stage_its_end(said, monkeypatch):
    assert list(track("abc", 3, "encoding", "passages")) == ["a", "b", "c"] and said.getvalue() == ""
    with Stage("evaluating jmlr", 2, "questions") as stage:
        stage.update(2)
    assert said.getvalue().startswith("evaluating jmlr: 2 questions in ")
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    assert list(track(range(0, 5, 2), 5, "encoding", "passages", each=2)) == [0, 2, 4]
    assert said.getvalue().splitlines()[-1].startswith("encoding: 5 passages in ")


def test_a_loop_that_fails_has_no_end(said):
    with pytest.raises(ZeroDivisionError), Stage("one", 1, "rows"):
        raise ZeroDivisionError
    with Stage("two", 1, "rows"):
        pass
    assert said.getvalue().startswith("two: ")


# One loop at a time


def test_what_runs_inside_or_beside_a_loop_is_silent(said, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)

    def inner():
        assert list(track("ab", 2, "inner", "letters")) == ["a", "b"]

    beside = threading.Thread(target=inner)
    with Stage("outer", 1, "rows"):
        inner()
        beside.start()
        beside.join()
    assert {line.split(":")[0] for line in said.getvalue().splitlines()} == {"outer"}
    inner()
    assert said.getvalue().splitlines()[-1].startswith("inner: 2 letters")


def test_a_loop_that_is_left_early_makes_room(said):
    for _ in track("abc", 3, "left", "letters"):
        break
    with Stage("next", 1, "rows"):
        pass
    assert said.getvalue().startswith("next: ")


def test_other_processes_are_silent(monkeypatch):
    said = listen(monkeypatch, terminal=False, quiet=True)
    with Stage("one", 1, "rows") as stage:
        stage.update(1)
    assert said.getvalue() == ""


# On a terminal


def test_a_terminal_has_a_bar_that_goes_and_a_line_that_stays(monkeypatch):
    said = listen(monkeypatch, terminal=True)
    with Stage("evaluating [jmlr]", 8, "questions") as stage:
        stage.update(3, "so [far]")
        stage.update(8, "so [far]")
    text = CODES.sub("", said.getvalue())
    assert "━" in text and "8/8" in text and "evaluating [jmlr] " in text and "so [far]" in text
    assert text.splitlines()[-1].startswith("evaluating [jmlr]: 8 questions in ")


@pytest.mark.parametrize("terminal", [False, True])
def test_training_tells_step_losses_and_speed(monkeypatch, tmp_path, terminal):
    said = listen(monkeypatch, terminal=terminal)
    with MetricsLog(tmp_path, "jmlr", 2, 1, 4, 0) as log:
        for step in (1, 2):
            log.push(step, {"loss/answer": 1.5, "loss/rank": 0.5}, {"recall/candidates": 0.25})
        log.flush()
    text = CODES.sub("", said.getvalue())
    assert ("2/2" in text) == terminal
    last = text.splitlines()[-1]
    assert last.startswith("training jmlr: 2 steps in ") and last.endswith(" questions/s")
    assert "answer loss 1.500, rank loss 0.500, recall@K 0.250" in last
