"""Whether cheaper judgements rank passages as full ones do: in int8, and of an earlier reader.

    python benchmarks/cheaper_judging.py RUN [--phase jmlr] [--questions 64] [--json FILE]

RUN is the directory of one seed. The generator as it stood at each kept checkpoint of the phase (keep more of them with
``train.keep_last``), and before its first step, judges dev questions with the passages of the judge's probe: the right
one, BM25's that are not, and random ones. Each row holds two ways of judging against one another:

int8     the same reader, its products in int8 (``train.judge_int8``), beside full ones
earlier  the reader of an earlier checkpoint, beside the later one: what keeping a judgement for those steps would mean

tau: Kendall's tau-b of a question's passages, mean. first: questions in which both put the same passage first. pairs:
of the pairs that ``train.help_margin`` counts by full judgements, those that the other way counts too. right: questions
whose right passage each way puts first.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from exported import opened
from scipy.stats import kendalltau

from jmlr_jax.method.losses import counted_pairs
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import phase_folder, phase_weights
from jmlr_jax.training.probe import JudgeProbe, on_dev
from jmlr_jax.training.program import PhaseProgram, phase_program


def readers(run: Run, phase: str) -> dict[int, Any]:
    """Steps of the phase and the generator's weights there; of step 0 those it began with."""
    kept = phase_folder(run, phase) / "checkpoints"
    steps = sorted(int(path.name) for path in kept.iterdir() if path.name.isdigit())
    found = {0: phase_weights(run, PHASES[phase])["generator"]}
    for step in steps:
        tree = ocp.StandardCheckpointer().restore((kept / str(step) / "state").absolute())
        found[step] = tree["params"]["generator"]
    return found


def judge(run: Run, int8: bool) -> PhaseProgram:
    """What judges, in int8 or in full; compiled once for all readers."""
    train = run.cfg.train.model_copy(update={"judge_int8": int8})
    cfg, ids = run.cfg.model_copy(update={"train": train}), run.prepared.generator_ids
    return phase_program(cfg, PHASES["separate_retriever"], run.retriever, run.llama, ids, train.steps, run.mesh)


def counted(nll_PxK: np.ndarray, margin: float) -> np.ndarray:
    """Pairs (better, worse) that the rank loss counts, bool [P, K, K]."""
    better, counts = (
        np.asarray(x) for x in counted_pairs(jnp.asarray(nll_PxK), jnp.asarray(~np.isnan(nll_PxK)), margin)
    )
    return better & (counts | counts.swapaxes(1, 2))


def agreement(full_PxK: np.ndarray, other_PxK: np.ndarray, margin: float) -> dict[str, float]:
    """How far another way of judging agrees with the full one."""
    there_PxK = ~np.isnan(full_PxK)
    taus = [kendalltau(a[t], b[t]).statistic for a, b, t in zip(full_PxK, other_PxK, there_PxK, strict=True)]
    first_P, other_P = np.nanargmin(full_PxK, axis=1), np.nanargmin(other_PxK, axis=1)
    pairs, others = counted(full_PxK, margin), counted(other_PxK, margin)
    return {
        "tau": float(np.nanmean(taus)),
        "first": float(np.mean(first_P == other_P)),
        "pairs": float((pairs & others).sum() / max(1, pairs.sum())),
        "right": float(np.mean(first_P == 0)),
        "right of the other": float(np.mean(other_P == 0)),
        "nats apart, median": float(np.nanmedian(np.abs(full_PxK - other_PxK))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--phase", default="jmlr")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    run = opened(args.run, f"train.probe_questions={args.questions}")
    in_full, in_int8 = judge(run, int8=False), judge(run, int8=True)
    probe, still = JudgeProbe(run, in_full), run.initial_weights() | {"skip_V": run.prepared.skip_V}
    margin, full = run.cfg.train.help_margin, {}
    rows: list[dict[str, Any]] = []

    def judged(program: PhaseProgram, generator: Any) -> np.ndarray:
        with jax.set_mesh(run.mesh):
            asked = partial(program.probe, {}, still | {"generator": generator})
            nll_PxK = on_dev(run, asked, probe.rows, probe.table_PxK)
        return np.where(probe.table_PxK >= 0, nll_PxK, np.nan)

    print(
        "| reader after | judged | tau | first | pairs | right, full | right, other | nats apart |\n" + "|---" * 8 + "|"
    )

    def row(step: int, way: str, **found: float) -> None:
        rows.append({"step": step, "judged": way, **found})
        print(f"| {step} | {way} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |", flush=True)

    for step, generator in readers(run, args.phase).items():
        full[step] = judged(in_full, generator)
        row(step, "int8", **agreement(full[step], judged(in_int8, generator), margin))
        for earlier in sorted(set(full) - {step}):
            row(step, f"after {earlier}", **agreement(full[step], full[earlier], margin))
    if args.json:
        found = {"questions": len(full[0]), "passages": full[0].shape[1], "help_margin": margin, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
