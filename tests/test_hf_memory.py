"""Reading a checkpoint needs little more memory than its weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.exhaustive
def test_host_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """Llama-2-7B's 32 layers with an eighth of its width, 0.21 GB in three files, sharded over four devices of a fresh
    process: less than 0.15 GB on top.

    What is there on top is mostly compiled code; a copy of the model on the way would be all of it.
    """
    options = ["--scale", "8", "--devices", "4", "--remove"]
    command = [sys.executable, "benchmarks/import_7b.py", str(tmp_path), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: float(value) for name, value in re.findall(r"^(\w+) +(-?[\d.]+)$", done.stdout, re.MULTILINE)}
    assert (found["devices"], found["files"], found["weights_gb"]) == (4, 3, 0.21)
    assert -0.02 < found["peak_beyond_weights_gb"] < 0.15
    assert list(tmp_path.iterdir()) == []
