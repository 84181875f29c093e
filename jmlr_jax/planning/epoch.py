"""What an epoch of a data set takes at its own lengths: steps, refreshes, evaluation, checkpoints, compilation."""

from __future__ import annotations

import math

from jmlr_jax.planning.chips import GIB
from jmlr_jax.planning.plan import Plan

WRITING = 1 * GIB  # bytes/s of a checkpoint to a bucket: an assumption
KEPT = 1.5  # bytes of a checkpoint over those of the moments: two of them and the weights that train


def hours(plan: Plan) -> dict[str, float]:
    """Hours by part of one epoch with an evaluation of the test questions at its end; they add up to the whole.

    Refreshes encode the corpus on the chips that train; what its index takes is the host's, beside the steps, and not
    in it. A checkpoint counts whole, though most of it is written beside the steps.

    Raises:
        ValueError: the plan is of no data set, or a program of it does not fit.
    """
    programs = (plan.step.typical, plan.encode and plan.encode.estimate, plan.evaluate and plan.evaluate.estimate)
    step, encode, evaluate = programs
    if plan.lengths is None or not (step and encode and evaluate and plan.encode and plan.evaluate):
        raise ValueError("a plan of the whole at the lengths of a data set is needed, of programs that fit")
    train, chips = plan.cfg.train, plan.chips
    steps = math.ceil(plan.lengths.train / train.batch_size)
    tables = 1 + (steps - 1) // train.refresh_steps if train.refresh_steps else 1
    rows = -(-plan.cfg.index.encode_batch // chips) * chips
    saved = plan.step.parts["optimizer"] * chips * KEPT
    seconds = {
        "steps": steps * step.total,
        "refreshes": tables * math.ceil(plan.lengths.corpus / rows) * encode.total,
        "evaluation": math.ceil(plan.lengths.test / plan.cfg.eval.batch_size) * evaluate.total,
        "checkpoints": math.ceil(steps / train.checkpoint_steps) * saved / WRITING,
        "compilation": plan.step.compiling + plan.encode.compiling + plan.evaluate.compiling,
    }
    return {name: value / 3600 for name, value in seconds.items()}
