"""`jmlr eval` on the command line: its arguments, and what it does. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from jmlr_jax.config import Config, SuiteName
from jmlr_jax.errors import JmlrError

SUITES = get_args(SuiteName)


class SuiteError(JmlrError):
    """A suite without its file, or a file without its suite."""


def add_arguments(command: argparse.ArgumentParser, arms: Sequence[str]) -> None:
    """Arguments of ``eval``; `arms` may be named."""
    command.add_argument("--arm", choices=(*arms, "all"), default="all", help="default: all (eval.arms)")
    command.add_argument(
        "--suite",
        choices=SUITES,
        metavar="NAME",
        help=f"a published set of questions in place of eval.split: {', '.join(SUITES)}",
    )
    command.add_argument("--questions", metavar="FILE", help="the file of the suite, as its makers publish it")


def evaluate(config: Config, args: argparse.Namespace) -> None:
    """`jmlr eval`."""
    if (args.suite is None) != (args.questions is None):
        what = f"--suite {args.suite} needs --questions FILE" if args.suite else "--questions FILE needs --suite NAME"
        raise SuiteError(f"{what}: the published file, and whose questions it holds (docs/suites.md)")
    arms = config.eval.arms if args.arm == "all" else (args.arm,)
    from jmlr_jax.run.open import Run

    if args.suite is None:
        from jmlr_jax.evaluation.arms import evaluate_arms

        evaluate_arms(Run.open(config), arms)
        return
    from jmlr_jax.evaluation.suites import evaluate_suite

    evaluate_suite(Run.open(config), args.suite, args.questions, arms)
