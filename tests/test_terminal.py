"""What a command prints: its own lines, text of users as it stands, on any terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import environment
from rich.console import Group
from rich.text import Text
from runs import TINY

from jmlr_jax.cli import main
from jmlr_jax.parallel import distributed
from jmlr_jax.retrieval.scann import ScannSettings, build_searcher

ODD = "[/INST] [bold]x[/bold] :pill: naïve"  # markup, an emoji's name, a letter beyond ASCII
# The command line where PyTorch is missing, as after the installation that is not for tests.
WITHOUT_TORCH = (
    "import importlib.util as u, sys; find = u.find_spec; "
    "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
    "from jmlr_jax.cli import main; raise SystemExit(main(sys.argv[1:]))"
)
OURS = (
    r"-+ seed 0 -+",
    r"questions|tokens \(12 passages\)|[+|].*",  # the two tables
    r"train.jsonl: 1 bad records skipped, first: .*",
    r"leakage \(.*",
    r"/.*/index/initial: scann index of 12 passages, .*",
    r"/.*/index/jmlr: scann index of 12 passages, .*",
    r"jmlr: training retriever [\d,]+, generator [\d,]+",
    r"training jmlr: .*",
    r"evaluating jmlr: .*",
    r"encoding .*|tuning .*|compiling: .*",  # on a slow machine
)


def write_data(folder: Path) -> None:
    """12 passages, 8 training, 4 dev and 4 test questions; a record that cannot be read."""
    passages = [{"id": f"p{i}", "text": f"{ODD} Drug{i} helps against disease{i}."} for i in range(12)]
    options = {"A": "drug", "B": "rest"}
    questions = [
        {"id": f"q{i}", "question": f"What helps against disease{i % 12}?", "options": options, "answer": "A"}
        for i in range(16)
    ]
    splits = {"train": [{**questions[0], "id": ODD, "answer": ODD}, *questions[:8]]}
    splits |= {"dev": questions[8:12], "test": questions[12:], "corpus": passages}
    for name, records in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = {f"{name}_path": f"{name}.jsonl" for name in splits}
    config = TINY | {
        "data": {"questions": "jsonl", "on_error": "skip", **paths},
        "index": {"kind": "scann", "oracle_queries": 4, "encode_batch": 8},
        "train": TINY["train"] | {"steps": 2, "refresh_steps": 0, "checkpoint_steps": 2},
        "eval": TINY["eval"] | {"arms": ["jmlr"]},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.exhaustive
def test_a_whole_run_into_a_file_tells_of_every_stage_and_of_nothing_else(tmp_path):
    """Standard error is no terminal here, and its encoding holds no more than ASCII."""
    write_data(tmp_path)
    env = environment() | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", WITHOUT_TORCH, "run", "--config", "small.yaml", "--run-dir", "out"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not any(re.fullmatch(ours, line) for ours in OURS)] == []
    assert [ours for ours in OURS[:-1] if not any(re.fullmatch(ours, line) for line in lines)] == []
    (skipped,) = (line for line in lines if "bad records" in line)
    assert ODD.replace("ï", r"\xef") in skipped
    (trained,) = (line for line in lines if line.startswith("training jmlr: 2 steps in "))
    assert "answer loss" in trained and "questions/s" in trained
    assert "JMLR (joint)" in done.stdout and "JMLR ?" in done.stdout  # a minus sign that ASCII does not have


def test_prepare_shows_its_tables(tmp_path, monkeypatch, capsys):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--config", "small.yaml", "--run-dir", "out"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "questions" in lines and "tokens (12 passages)" in lines
    assert any(ODD in line for line in lines) and any(line.startswith("leakage") for line in lines)


def test_text_is_printed_as_it_stands(capsys):
    distributed.console().print(f"{ODD} {'/a' * 100} 12")
    distributed.console(out=True).print(ODD)
    shown = capsys.readouterr()
    assert shown.err == f"{ODD} {'/a' * 100} 12\n" and shown.out == f"{ODD}\n"


def test_text_does_not_steer_the_terminal(capsys):
    distributed.console(out=True).print(Group(Text("a\x1b[2J\x9b31m b\nc"), "\x1b]0;title\x07"))
    assert capsys.readouterr().out == "a\ufffd[2J\ufffd31m b\nc\n\ufffd]0;title\n"


def test_scann_trains_in_silence(capfd):
    """Its logs come from C++; both kinds of an index of many passages log."""
    fde_NxF = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    for how in (ScannSettings(None, None, True), ScannSettings(8, 4, True)):
        build_searcher(fde_NxF, how)
    assert capfd.readouterr().err == ""


def test_errors_of_other_libraries_are_shown():
    code = (
        "from jmlr_jax import chatter; chatter.hush(); from absl import logging; "
        "logging.warning('noise'); logging.error('fault')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fault" in done.stderr and "noise" not in done.stderr


def test_work_that_ends_after_a_refused_checkpoint_says_nothing():
    """TensorStore's threads report what they cannot deliver as Python reports a failed `__del__`."""
    code = (
        "from jmlr_jax import chatter; chatter.hush()\n"
        "class Late:\n"
        "    def __init__(self, said): self.said = said\n"
        "    def __del__(self): raise RuntimeError(self.said)\n"
        "for said in ('Event loop is closed', 'fault'): Late(said)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if line.startswith("RuntimeError")] == ["RuntimeError: fault"]


def test_orbax_prints_no_traceback_of_what_it_raises():
    """On a full disk each of its threads does. Its other errors, and tracebacks of others, are shown."""
    code = (
        "from jmlr_jax import chatter; chatter.hush()\n"
        "text = 'from absl import logging; logging.exception(said); logging.error(said + 2 * chr(33))'\n"
        "for file in ('/x/orbax/checkpoint/future.py', '/x/grain/loader.py'):\n"
        "    exec(compile(text, file, 'exec'), {'said': file})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.partition(":absl:")[2] for line in done.stderr.splitlines() if "absl" in line] == [
        "/x/orbax/checkpoint/future.py!!",
        "/x/grain/loader.py",
        "/x/grain/loader.py!!",
    ]
