"""A joint step here, beside what else could run it: PyTorch in the released code's way, and PyTorch in batches.

    python benchmarks/step_peers.py FOLDER [--steps 3] [--micro 2] [--data DIR] [key=value ...]

Models: SmolLM2-135M-Instruct (from its 4-bit file, dequantised) with adapters of rank 16 on all projections, and
all-MiniLM-L6-v2 with a projection to 128, trained whole. Questions and passages: MedQuAD, with BM25's eight passages
as candidates, of which four are judged and three are read; passages have at most 160 tokens. All three start from the
same weights and adapters, see the same token ids in the same order, draw the same samples and update by AdamW, in
float32; none has dropout, which the released code has even where it judges. Each is a process of its own and the
others wait while it makes a step, so that a busy machine slows all alike. The first step, with compilation in it, is
not in the times; its losses, as all others, have to agree. Memory is managed as `tpu_scripts/run.sh` has it.

ours      the joint step of `jmlr train`, compiled for batches of fixed shape; key=value changes its configuration
released  one question at a time at its natural length, its passages judged one after the other, logits everywhere
batched   `--micro` questions at a time, padded on the right to the longest, for which causal attention needs no mask;
          all their passages judged at once; logits only where an answer token is predicted

Needs the extras [test] and [models]. FOLDER keeps the models and batches; the result is printed, and lies there as
``result.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = """\
data: {questions: jsonl, leakage_ngram: 0, on_error: skip}
retriever:
  query_marker: "[unused0]"
  passage_marker: "[unused1]"
  augment_queries: false
  dim: 128
  query_length: 64
  passage_length: 160
  bert: {max_positions: 256}
generator:
  passage_length: 160
  question_length: 104
  answer_length: 28
  max_length: 640
  llama: {max_positions: 1024, remat: attention}
  lora: {rank: 16, alpha: 32, dropout: 0, targets: [q, k, v, o, gate, up, down]}
train:
  batch_size: 8
  accumulate: 4
  candidates: 8
  mix: {index: 8, bm25: 0, random: 0}
  sampled: 4
  read_passages: 3
  help_margin: 0
  warmup: {steps: 0}
  retriever: {learning_rate: 1.0e-5, warmup_steps: 0, final_fraction: 1}
  generator: {learning_rate: 2.0e-4, warmup_steps: 0, final_fraction: 1}
mesh: {data: 1, fsdp: 1, tensor: 1}
"""
WAYS = ("ours", "released", "batched")
# As tpu_scripts/run.sh sets them for `jmlr`, here for all three: freed memory stays with the process.
MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
AGREE = 2e-3  # relative difference of losses: float32, other orders of summation, and AdamW's square roots


def serve(open_way: Callable[[], Callable[[int], dict[str, float]]]) -> None:
    """Answers the main process: what it opens makes the step of a number; with it go seconds and peak memory.

    A line of standard output is one answer; whatever libraries print goes to standard error.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    step = open_way()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not in what was read or imported
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(step(int(line)) | {"peak_gib": _peak()}), file=answers, flush=True)


def _peak() -> float:
    """The most memory this process has had, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


class Way:
    """A process that makes steps in one way."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        file = "step_peers_ours.py" if name == "ours" else "step_peers_torch.py"
        command = [sys.executable, str(HERE / file), *arguments]
        env = MEMORY | os.environ | {"PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
        self.name = name
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def step(self, number: int) -> dict[str, float]:
        """Makes one step; seconds, losses and peak memory."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self._process.wait()}; what it said is above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def disagreement(rows: dict[str, list[dict[str, float]]]) -> float:
    """The largest relative difference of a loss from that of the released way, over all steps."""
    return max(
        abs(mine[key] - theirs[key]) / abs(theirs[key])
        for name in WAYS
        for mine, theirs in zip(rows[name], rows["released"], strict=True)
        for key in ("loss/answer", "loss/rank")
    )


def table(rows: dict[str, list[dict[str, float]]], questions: int) -> str:
    """Markdown: the median of the steps after the first, the range, memory, losses."""
    seconds = {name: [row["seconds"] / questions for row in made[1:]] for name, made in rows.items()}
    base = statistics.median(seconds["released"])
    lines = ["| way | questions/s | of the released way | seconds a question | peak GiB | first step, s | losses |"]
    lines.append("|---" * 7 + "|")
    for name, made in rows.items():
        middle = statistics.median(seconds[name])
        losses = ", ".join(f"{row['loss/answer']:.4f} + {row['loss/rank']:.4f}" for row in made)
        lines.append(
            f"| {name} | {1 / middle:.3f} | {base / middle:.2f} | {middle:.2f} ({min(seconds[name]):.2f} to "
            f"{max(seconds[name]):.2f}) | {made[-1]['peak_gib']:.1f} | {made[0]['seconds']:.0f} | {losses} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Starts the three, lets them make steps in turns, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3, help="after the first")
    parser.add_argument("--micro", type=int, default=2, help="questions at a time of the batched way")
    data = Path(os.environ.get("JMLR_DATA", HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data / "tiny", help="with medquad/ and medquad_mcq/")
    args, overrides = parser.parse_known_args()
    if wrong := [word for word in overrides if word.startswith("-")]:
        parser.error(f"unknown option {wrong[0]}")
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "asked.yaml").write_text(CONFIG)
    total, folder = args.steps + 1, str(args.folder)
    ways = [Way("ours", [folder, str(args.data), str(total), *overrides])]  # the first: it makes what the others read
    ways += [Way(name, [folder, name, str(args.micro)]) for name in WAYS[1:]]
    facts: dict[str, Any] = json.loads((args.folder / "facts.json").read_text())
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(total):
        for way in ways[number % 3 :] + ways[: number % 3]:
            rows[way.name].append(way.step(number))
            print(f"step {number}, {way.name}: {rows[way.name][-1]['seconds']:.1f} s", file=sys.stderr)
    for way in ways:
        way.close()
    tokens = ", ".join(f"{facts[name]:.0f} {name}" for name in ("read", "judged", "encoded"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{facts['questions']} questions a step; real tokens a question: {tokens}")
    print(table(rows, facts["questions"]))
    found = disagreement(rows)
    print(f"losses agree to {found:.1e}")
    (args.folder / "result.json").write_text(
        json.dumps({"facts": facts, "rows": rows, "disagreement": found}, indent=1)
    )
    if found > AGREE:
        sys.exit(f"losses differ by {found:.1e}, more than {AGREE}: the three do not compute the same")


if __name__ == "__main__":
    main()
