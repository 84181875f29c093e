"""Which pairs of judged passages a margin keeps: those that a retriever should learn from, or others.

    python benchmarks/judge_pairs.py RUN [PHASE ...] [--questions 384] [--json FILE]

Takes training questions of a run with the candidates they had at the start of the joint phase, lets the generator of
each PHASE (default: warmup jmlr) judge all of them alone, and draws `train.sampled` for each. Of every ordered pair
(better, worse) it asks whether the better one is a gold passage, under two rules with the same margins:

difference  the two judgements lie further apart than the margin
helps       the better one lies below the median of those drawn by more than the margin (``train.help_margin``)

Gold labels are read for this count alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jmlr_jax import config_io
from jmlr_jax.config_io import RESOLVED_NAME
from jmlr_jax.data.batches import assemble
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import load_weights, phase_folder
from jmlr_jax.training.program import phase_program

MARGINS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6)


def judgements(run: Run, phase: str, rows: np.ndarray, table_NxK: np.ndarray) -> np.ndarray:
    """Loss of the right answer after each candidate alone, ``nll_NxK``, by the generator of a phase."""
    cfg, size = run.cfg, run.cfg.train.batch_size
    judging = PHASES["separate_retriever"]
    weights = run.initial_weights()
    kept = phase_folder(run, phase) / "weights" / "generator"
    weights["generator"] = load_weights(kept, run.abstract(("generator",))["generator"])
    weights["skip_V"] = jnp.asarray(run.prepared.skip_V)
    found = []
    with jax.set_mesh(run.mesh):
        ids = run.prepared.generator_ids
        program = phase_program(cfg, judging, run.retriever, run.llama, ids, cfg.train.steps, run.mesh)
        for first in range(0, len(rows), size):
            batch = assemble(run.prepared, "train", rows[first : first + size], table_NxK[first : first + size])
            found.append(np.asarray(program.probe({}, weights, jax.tree.map(jnp.asarray, batch))))
    return np.concatenate(found)


def counts(nll_NxM: np.ndarray, gold_NxM: np.ndarray) -> list[dict[str, float]]:
    """For each rule and margin how many pairs it keeps whose better passage is gold, and how many others."""
    lead_NxMxM = nll_NxM[:, None, :] - nll_NxM[:, :, None]
    middle_Nx1 = np.median(nll_NxM, axis=1, keepdims=True)
    found = []
    for margin in MARGINS:
        helps_NxM = nll_NxM < middle_Nx1 - margin
        rules = {"difference": lead_NxMxM > margin, "helps": (lead_NxMxM > 0) & helps_NxM[:, :, None]}
        for rule, kept in rules.items():
            right = int((kept & gold_NxM[:, :, None] & ~gold_NxM[:, None, :]).sum())
            other = int((kept & ~gold_NxM[:, :, None]).sum())
            found.append({"rule": rule, "margin": margin, "gold": right, "other": other})
    return found


def main() -> None:
    """Prints the table of each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("phases", nargs="*", default=["warmup", "jmlr"], metavar="PHASE")
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    run = Run.open(config_io.load(str(args.run / RESOLVED_NAME), [f"run_dir={args.run}"]))
    made = np.load(phase_folder(run, "jmlr") / "tables" / "step_0000000.npz")
    size = run.cfg.train.batch_size
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(made["rows"]), args.questions // size * size, replace=False)
    rows, table_NxK, gold = made["rows"][drawn], made["train"][drawn], run.gold("train")
    gold_NxK = np.array([[p in gold[row] for p in line] for row, line in zip(rows, table_NxK, strict=True)])
    K, M = table_NxK.shape[1], run.cfg.train.sampled
    sample_NxM = np.stack([rng.permutation(K)[:M] for _ in rows])
    result = {}
    for phase in args.phases:
        nll_NxM = np.take_along_axis(judgements(run, phase, rows, table_NxK), sample_NxM, axis=1)
        gold_NxM = np.take_along_axis(gold_NxK, sample_NxM, axis=1)
        result[phase] = counts(nll_NxM, gold_NxM)
        print(f"\n{phase}: {len(rows)} questions, a gold passage among the {M} drawn for {gold_NxM.any(1).mean():.0%}")
        print("| rule | margin, nats | better one is gold | another | share |\n|---|---|---|---|---|")
        for row in sorted(result[phase], key=lambda row: str(row["rule"])):
            share = row["gold"] / max(row["gold"] + row["other"], 1)
            print(f"| {row['rule']} | {row['margin']} | {row['gold']} | {row['other']} | {share:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
