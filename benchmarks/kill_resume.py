"""Kills a training run at random moments and compares what it ends with to a run that nobody touched.

    python benchmarks/kill_resume.py [--kills 5] [--seed 0] [--steps 300] [--folder DIR]

Both runs train the joint arm on the embedded world with small models, in processes of their own. The one is sent
SIGKILL at random moments of its training (never while it still compiles, so that every kill destroys work) and
started again by the same command each time. Its ``metrics.jsonl`` must have the very bytes of the other's, and its
final weights the very bits. Exit status 1 if they have not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TINY = """
data.world.conditions=72 data.world.values=12
retriever.tokenizer_vocab=512 retriever.dim=8 retriever.bert.hidden_size=16 retriever.bert.intermediate_size=16
retriever.query_length=24 retriever.passage_length=40 index.encode_batch=64 index.oracle_queries=4
generator.tokenizer_vocab=512 generator.passage_length=56 generator.question_length=80 generator.answer_length=12
generator.llama.hidden_size=16 generator.llama.intermediate_size=16 generator.llama.num_layers=1
generator.llama.num_heads=1 generator.llama.num_kv_heads=1
train.batch_size=4 train.candidates=4 train.mix.index=2 train.mix.bm25=1 train.mix.random=1 train.sampled=3
train.pack=[] train.read_passages=2 train.dev_questions=4 train.log_steps=1 train.warmup.steps=0
""".split()  # a run of seconds
SETTINGS = [*TINY, "train.refresh_steps=20", "train.refresh_delay=8", "train.checkpoint_steps=6"]


def start(folder: Path, command: str, steps: int) -> subprocess.Popen[bytes]:
    """``jmlr COMMAND`` on a run directory; what it says goes to ``log.txt`` there."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "jmlr_jax", command, "--config", str(folder.parent / "defaults.yaml")]
    words += ["--run-dir", str(folder), f"train.steps={steps}", *SETTINGS]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(words, env=env, stdout=log, stderr=log)


def finish(folder: Path, command: str, steps: int) -> None:
    """Runs a command to its end."""
    if status := start(folder, command, steps).wait():
        sys.exit(f"jmlr {command} ended with status {status}; see {folder / 'log.txt'}")


def lines(folder: Path) -> int:
    """Complete lines in the metrics file."""
    file = folder / "arms" / "jmlr" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(folder: Path, steps: int, after: int) -> str:
    """Starts training and kills it once so many more lines are written; what was found then."""
    process = start(folder, "train", steps)
    compiling = lines(folder)
    while process.poll() is None and lines(folder) == compiling:
        time.sleep(0.005)
    begun = lines(folder)  # what came after the last checkpoint has been cut by now
    while process.poll() is None and lines(folder) < begun + after:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        sys.exit(f"the run ended before it could be killed (status {process.returncode}); see {folder / 'log.txt'}")
    saved = [int(p.name) for p in (folder / "arms/jmlr/checkpoints").glob("*") if p.name.isdecimal()]
    return f"lines written {lines(folder):4d}   last checkpoint at step {max(saved, default=0):4d}"


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Final weights by path."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for part in ("retriever", "generator"):
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore(folder.absolute() / "arms" / "jmlr" / "weights" / part)
        found |= {part + jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "defaults.yaml").write_text("{}\n")
    whole, killed = folder / "whole", folder / "killed"
    for run in (whole, killed):
        finish(run, "prepare", args.steps)
    finish(whole, "train", args.steps)
    rng = random.Random(args.seed)
    for number in range(1, args.kills + 1):
        # Uniform over the steps that, at most, one start in so many may do.
        found = kill(killed, args.steps, rng.randint(1, args.steps // (args.kills + 1)))
        print(f"kill -9 {number}: {found}", flush=True)
    finish(killed, "train", args.steps)

    resolved = [(run / "config.yaml").read_text().replace(str(run), "RUN") for run in (whole, killed)]
    if resolved[0] != resolved[1]:
        sys.exit("the two runs had different configurations: the package was edited while this ran")
    files = [run / "arms" / "jmlr" / "metrics.jsonl" for run in (whole, killed)]
    same_metrics = files[0].read_bytes() == files[1].read_bytes()
    one, other = weights(whole), weights(killed)
    same = sum(name in other and np.array_equal(one[name], other[name]) for name in one)
    same_weights = one.keys() == other.keys() and same == len(one)
    print(f"metrics.jsonl   {lines(whole)} and {lines(killed)} lines   {'equal' if same_metrics else 'DIFFERENT'}")
    print(f"final weights   {same} of {len(one)} arrays equal   {'equal' if same_weights else 'DIFFERENT'}")
    sys.exit(not (same_metrics and same_weights))


if __name__ == "__main__":
    main()
