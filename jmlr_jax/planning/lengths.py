"""How long prompts really are, and what packing makes of it: how often a step computes for how many places.

Lengths come from a prepared run, or are those measured of a named data set. Steps are drawn from them: every prompt of
its own question, with passages at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jmlr_jax.config import Config
from jmlr_jax.data.batches import Prepared
from jmlr_jax.files import local_path
from jmlr_jax.nn.packing import sizes
from jmlr_jax.planning.programs import CHAT_OPENING, PlanError

STEPS = 400  # that are drawn


@dataclass(frozen=True)
class Lengths:
    """What a data set is made of.

    Attributes:
      passages, questions, answers: tokens of the rendered pieces, in ascending order: quantiles, evenly spaced.
      corpus, train, test: how many passages and questions there are.
    """

    name: str
    passages: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    corpus: int
    train: int
    test: int


# Deciles of the 1,082 MedQA questions of MIRAGE with their options, and of textbook passages (OpenStax) at 200 words,
# by the tokenizer of SmolLM2 (49,152 tokens); sizes as published: MedQA's splits, MedRAG's snippets of 18 textbooks.
MEDQA = Lengths(
    "medqa",
    passages=np.array([226, 252, 259, 264, 269, 274, 280, 287, 295, 307, 405]),
    questions=np.array([65, 127, 151, 170, 188, 208, 227, 250, 281, 325, 960]),
    answers=np.array([2, 4, 4, 5, 5, 6, 7, 8, 9, 13, 35]),
    corpus=125_847,
    train=10_178,
    test=1_273,
)


def lengths_of(name: str) -> Lengths:
    """``medqa``, or a run directory with prepared data.

    Raises:
        PlanError: neither.
    """
    if name == MEDQA.name:
        return MEDQA
    try:
        prepared = Prepared.open(local_path(name) / "data")
    except FileNotFoundError:
        what = f"neither {MEDQA.name} nor a directory with prepared data (`jmlr prepare`)"
        raise PlanError(f"--lengths {name}: {what}") from None

    def tokens(table: str) -> np.ndarray:
        found = np.sort(np.diff(prepared.tokens(table).offsets))
        if not len(found):
            raise PlanError(f"--lengths {name}: no {table} there")
        return found

    counts = (len(prepared.passages), *(len(prepared.questions(split)) for split in ("train", "test")))
    return Lengths(name, tokens("references"), tokens("train.questions"), tokens("train.answers"), *counts)


@dataclass(frozen=True)
class Packed:
    """What a step computes for, at these lengths.

    Attributes:
      mean: tokens of a prompt, of ``judge`` and ``read``.
      width: tokens of one at full length.
      places: what a program chooses from, as fractions of all places; the last is 1, which packs nothing.
      shares: fraction of microbatches for each of them.
    """

    mean: dict[str, float]
    width: dict[str, int]
    places: dict[str, tuple[float, ...]]
    shares: dict[str, tuple[float, ...]]


def packed(lengths: Lengths, cfg: Config, groups: int) -> Packed:
    """Draws steps; `groups` is how many chips share the rows of a batch."""
    g, train, rng = cfg.generator, cfg.train, np.random.default_rng(0)
    begin = CHAT_OPENING if g.chat else 1
    each = train.batch_size // train.accumulate // groups  # questions of a chip in a microbatch

    def draw(tokens: np.ndarray, most: int, *shape: int) -> np.ndarray:
        at = np.interp(rng.random((STEPS, groups, each, *shape)), np.linspace(0, 1, len(tokens)), tokens)
        return np.minimum(at.round().astype(int), most)

    fixed = begin + draw(lengths.questions, g.question_length) + draw(lengths.answers, g.answer_length)
    judged = draw(lengths.passages, g.passage_length, train.sampled)
    read = fixed[..., None] + np.cumsum(draw(lengths.passages, g.passage_length, train.read_passages), axis=-1)
    prompts = {
        "judge": (fixed[..., None] + judged, 1),
        "read": (np.where(read <= g.max_length, read, 0).max(axis=-1, initial=0)[..., None], train.read_passages),
    }
    mean, width, places, shares = {}, {}, {}, {}
    for name, (length, passages) in prompts.items():
        mean[name] = float(length.mean())
        width[name] = min(g.max_length, begin + passages * g.passage_length + g.question_length + g.answer_length)
        fullest = length.sum(axis=(2, 3)).max(axis=1)
        whole = each * length.shape[-1] * width[name]
        choices = sizes(train.pack, whole)
        at = np.sum(np.array(choices)[:, None] < fullest, axis=0) if choices else np.zeros(STEPS, int)
        places[name] = (*(size / whole for size in choices), 1.0)
        shares[name] = tuple((np.bincount(at, minlength=len(choices) + 1) / STEPS).tolist())
    return Packed(mean, width, places, shares)
