"""The small run that is broken, commands on it as processes of their own, and what a run holds in the end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kill_resume import TINY

SETTINGS = [*TINY, "train.refresh_steps=10", "train.refresh_delay=4", "train.checkpoint_steps=4", "train.steps=40"]
SETTINGS += ["eval.max_questions=8", "eval.batch_size=4", "eval.bootstrap=20", "eval.arms=[jmlr]", "eval.hit_at=[1,5]"]
STAGES = ("prepare", "index", "train", "eval", "export")
ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # after which a command counts as hanging


def quickly() -> None:
    """Lets JAX compile quickly, on the CPU; to be called before anything imports it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def words(stage: str, run: Path) -> list[str]:
    """The command of a stage; after `prepare` the run brings its configuration."""
    if stage == "prepare":
        return ["prepare", "--run-dir", str(run), *SETTINGS]
    if stage == "export":
        return ["export", str(run), str(run.parent / f"{run.name} exported")]
    return [stage, "--run-dir", str(run)]


def start(command: Sequence[str], log: Path, cache: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "jmlr_jax", *command], env=env, stdout=out, stderr=out)


def ended(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process: its status, negative for a signal; one that hangs is killed and is -100."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -100


def job(command: Sequence[str], count: int, log: Path, cache: Path) -> list[subprocess.Popen[bytes]]:
    """Starts a command in so many processes that find one another."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    return [start([*command, "--distributed", f"{where},{i},{count}"], log, cache) for i in range(count)]


def told(command: Sequence[str]) -> tuple[int, str, str]:
    """Runs a command in this process: its status (99 for what is no error of ours), what it said of its work, and
    what it printed."""
    from jmlr_jax import cli

    said, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            status = cli.main(list(command))
    except SystemExit as ended_early:
        status = int(ended_early.code or 0)
    except Exception as error:
        return 99, f"{type(error).__name__}: {error}", ""
    return status, said.getvalue(), printed.getvalue()


def weights(folder: Path) -> str:
    """Digest of the bits of a phase's final weights, however many processes wrote them, and whatever became of the note
    on where their arrays lay."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    hasher = hashlib.sha256()
    for part in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        with tempfile.TemporaryDirectory() as copied, ocp.PyTreeCheckpointer() as reader:
            copy = shutil.copytree(folder / part, Path(copied) / part, ignore=shutil.ignore_patterns("_sharding"))
            shape = reader.metadata(copy).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shape)
            tree = reader.restore(copy, restore_args=plain)
        for path, leaf in sorted((jax.tree_util.keystr(k), x) for k, x in jax.tree_util.tree_leaves_with_path(tree)):
            hasher.update(f"{part}{path}".encode() + np.ascontiguousarray(leaf).tobytes())
    return hasher.hexdigest()


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run ends with, by name; equal ones are equal runs."""
    files = [
        *("arms/jmlr/metrics.jsonl", "eval/test/jmlr/questions.jsonl", "eval/test/jmlr/summary.json"),
        *("eval/test/initial/summary.json",),
    ]
    found = {name: hashlib.sha256(_steady(run / name)).hexdigest() for name in files if (run / name).exists()}
    card = run / "data" / "prepare.json"
    if card.exists():
        found["fingerprints"] = json.loads(card.read_text())["fingerprints"]
    if (run / "arms/jmlr/weights").exists():
        found["weights"] = weights(run / "arms/jmlr/weights")
    exported = run.parent / f"{run.name} exported"
    for path in sorted(exported.rglob("*.safetensors")) if exported.exists() else ():
        found[f"exported {path.relative_to(exported)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("initial", "jmlr"):
        folder = run / "index" / name
        vectors = sorted(folder.rglob("vectors.npy"))
        if vectors:
            found[f"index {name}"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in vectors]
    return found


def _steady(file: Path) -> bytes:
    """The bytes of a file without what a clock has measured."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text())
    return json.dumps({k: v for k, v in content.items() if "second" not in k}, sort_keys=True).encode()


def recorded(file: Path) -> dict[int, dict[str, Any]]:
    """Results of an earlier start of the same campaign, by number; a line that a kill cut short is left out."""
    found = {}
    for line in file.read_text().split("\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[int(row["number"])] = row
    return found


def record(file: Path, row: dict[str, Any]) -> None:
    """Appends a result."""
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
