"""Seconds of `jmlr prepare` of two versions, side by side: MedQuAD, tokenizers made from it, the versions in turn.

    python benchmarks/prepare_versions.py OLD [--times 3] [--data ../shared/data] [--json FILE]

OLD is a working tree of the other version (``git worktree add OLD COMMIT``); the new one is the tree of this file. The
numbers of passages and questions are written beside, to be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = "retriever.query_length=64 retriever.passage_length=64 retriever.bert.max_positions=128"
LENGTHS += " generator.passage_length=64 generator.question_length=112 generator.answer_length=32"
SIZES = "retriever.tokenizer_vocab=8192 generator.tokenizer_vocab=8192"


def prepared(tree: Path, data: Path) -> dict[str, Any]:
    """One `jmlr prepare` of a version, in a process of its own: seconds, and what it made of the data."""
    mcq, folder = data / "medquad_mcq", Path(tempfile.mkdtemp(prefix="prepare_"))
    words = [sys.executable, "-m", "jmlr_jax", "prepare", "--run-dir", str(folder / "run"), "data.questions=jsonl"]
    words += [f"data.{split}_path={mcq / split}.jsonl" for split in ("train", "dev", "test")]
    words += [f"data.corpus_path={data / 'medquad' / 'corpus.jsonl'}", *LENGTHS.split(), *SIZES.split()]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    env = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    subprocess.run(words, cwd=tree, env=env, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    card = json.loads((folder / "run" / "data" / "prepare.json").read_text())
    shutil.rmtree(folder)
    return {
        "wall_s": round(wall, 1),
        "user_s": round(after.ru_utime - before.ru_utime, 1),
        "system_s": round(after.ru_stime - before.ru_stime, 1),
        "passages": card["passages"],
        "questions": card["questions"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trees = {"old": args.old.absolute(), "new": ROOT}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(args.times):
        for name, tree in trees.items():
            rows[name].append(prepared(tree, args.data.absolute()))
            print(name, rows[name][-1], flush=True)
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in ("wall_s", "user_s", "system_s")}
        for name, found in rows.items()
    }
    text = json.dumps({"median": medians, "runs": rows}, indent=1) + "\n"
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
