"""How sure an arm's answers are, by its answers on dev: a temperature, and a probability below which it abstains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmlr_jax.evaluation.answers import first_equal
from jmlr_jax.evaluation.calibration import fit_temperature, options_of, probabilities, sureness, threshold
from jmlr_jax.evaluation.evaluate import QUESTIONS
from jmlr_jax.run.artifact import Recipe
from jmlr_jax.run.open import Run
from jmlr_jax.run.weights import digests

CLOSE = 1e-6  # probabilities that differ by less are equal: the same question read in another batch rounds otherwise


@dataclass(frozen=True)
class Trust:
    """What dev questions say of an arm's probabilities.

    Attributes:
      temperature: of the options' probabilities; 1 where nothing is calibrated.
      least: the lowest probability of an answer that is given; None where no such probability kept the risk on dev.
      max_risk: fraction of the given answers that may be wrong.
      questions: how many dev questions with options this rests on.
      uncalibrated: why there is nothing to rest on, and what mends it; empty if calibrated.
    """

    temperature: float = 1.0
    least: float | None = None
    max_risk: float = 0.2
    questions: int = 0
    uncalibrated: str = ""

    def to_json(self) -> dict[str, Any]:
        """All attributes by name."""
        return asdict(self)

    def abstains(self, probability: float) -> str:
        """Why an answer of this probability is not given; empty if it is."""
        if self.uncalibrated:
            return ""
        share = f"{100 * self.max_risk:.0f}%"
        if self.least is None:
            return f"on {self.questions} dev questions no answer was sure enough to keep errors within {share}"
        if probability < self.least - CLOSE:
            sure = f"{100 * probability:.0f}% sure, and at least {100 * self.least:.0f}% is needed"
            return f"{sure} to keep errors within {share} (chosen on {self.questions} dev questions)"
        return ""


def trust_of(run: Run, arm: str) -> Trust:
    """Of an arm of a run, from ``eval/dev/ARM``, if that is of the weights that it has now."""
    folder, most = run.directory / "eval" / "dev" / arm, run.cfg.eval.max_risk
    remedy = f"`jmlr eval --arm {arm} eval.split=dev` calibrates it"
    made = Recipe.read(folder)
    if made is None or not (folder / QUESTIONS).is_file():
        return Trust(max_risk=most, uncalibrated=f"not calibrated: {arm} has not answered the dev questions; {remedy}")
    now = digests(run, arm)
    if any(made.inputs.get(f"arms/{name}") != digest for name, digest in now.items()):
        return Trust(max_risk=most, uncalibrated=f"not calibrated: trained again since it answered dev; {remedy}")
    return fitted(_rows(folder / QUESTIONS), most)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def fitted(rows: Sequence[Mapping[str, Any]], max_risk: float) -> Trust:
    """From evaluated dev questions, see :func:`jmlr_jax.evaluation.evaluate.evaluate_arm`."""
    options = options_of(rows)
    count = len(options.right_N)
    if not count:
        return Trust(max_risk=max_risk, uncalibrated="not calibrated: no dev question has options")
    temperature = fit_temperature(options)
    return Trust(temperature, threshold(sureness(options, temperature), max_risk), max_risk, count)


def option_probabilities(texts: Sequence[str], nll_O: Sequence[float], temperature: float) -> np.ndarray:
    """Probability of each option, float64 [O]; options that say the same share one, and each shows it.

    >>> option_probabilities(["yes", "no"], [0.0, 0.0], 2.0).tolist()
    [0.5, 0.5]
    >>> option_probabilities(["yes", "Yes.", "no"], [0.0, 5.0, 0.0], 1.0).tolist()
    [0.5, 0.5, 0.5]
    """
    row = {"options": len(texts), "option_texts": list(texts), "option_nll": [float(x) for x in nll_O], "answer": 0}
    p_O = probabilities(options_of([row]), temperature)[0]
    first = first_equal(texts)
    kept = list(dict.fromkeys(first))
    return np.array([p_O[kept.index(each)] for each in first])
