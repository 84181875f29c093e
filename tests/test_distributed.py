"""How processes find one another and agree, as far as one process can tell; real ones are in test_multiprocess.py."""

import subprocess
import sys

import pytest
from runs import open_run

from jmlr_jax.cli import main
from jmlr_jax.parallel import distributed
from jmlr_jax.parallel.distributed import DistributedError, Stop, check_same, from_first, gather, on_first
from jmlr_jax.run import open as run_module


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "expected auto, or HOST:PORT,ID,COUNT"),
        ("localhost:1,0", "expected auto, or HOST:PORT,ID,COUNT"),
        ("localhost,0,2", "expected auto, or HOST:PORT,ID,COUNT"),
        ("localhost:1,2,2", "process 2 of 2: they are numbered from 0"),
    ],
)
def test_where_the_others_are_is_checked(where, message, capsys):
    assert main(["train", "--distributed", where]) == 2
    assert f"jmlr: --distributed {where}: {message}" in capsys.readouterr().err


def test_a_command_of_one_process_takes_no_such_option(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--distributed", "auto", "a", "b"])


def test_alone_everything_is_immediate():
    done = []
    assert from_first(lambda: [1, "a"]) == [1, "a"] and gather({"a": 1}) == [{"a": 1}]
    on_first(lambda: done.append(1))
    check_same("this", 1, "that")
    stop = Stop()
    assert done == [1] and not stop.after(3, False) and stop.after(4, True)


def test_different_values_are_an_error_that_names_the_process_and_the_remedy(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: ["a", "a", "b"])
    with pytest.raises(DistributedError, match="the configuration of process 2 differs from that of process 0: do so"):
        check_same("the configuration", "a", "do so")


def test_a_directory_that_one_process_does_not_see(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "gather", lambda value: [value, False])
    with pytest.raises(DistributedError, match="process 1 does not see the data that process 0 sees"):
        open_run(tiny_data, tmp_path)


WATCHED = """
import os, sys
from jmlr_jax.parallel import distributed
distributed.watch()
{end}
"""


@pytest.mark.parametrize(
    ("end", "spoken"),
    [("os.kill(os.getpid(), 9)", True), ("os.abort()", True), ("distributed._dismiss_watcher()", False)],
)
def test_an_early_end_is_told_whatever_its_cause(end, spoken):
    said = subprocess.run([sys.executable, "-c", WATCHED.format(end=end)], capture_output=True, text=True).stderr
    assert ("jmlr: process 0 of 1 has ended before its work was done" in said) == spoken
