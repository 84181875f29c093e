"""The arms that are compared, as phases of one training loop that differ only in these few facts.

Every arm starts from the same warmed-up generator and gives it the same number of updates on the same questions; they
differ in where the passages come from and whether the retriever learns (method.md, Arms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PassageSource = Literal["mixed", "live", "retriever", "bm25", "random", "none"]


@dataclass(frozen=True)
class Phase:
    """One run of the loop.

    Attributes:
      name: its directory under ``arms/``.
      generator, retriever: phases whose final weights it starts from; None is the initial weights.
      passages: what is read. "live": the candidates, scored by the retriever as it learns; "retriever": the best of
        the retriever it starts from; "mixed": the warm-up's mixture.
      rank: whether the retriever learns from the generator's judgements.
      read: whether the generator learns to answer.
    """

    name: str
    generator: str | None
    retriever: str | None
    passages: PassageSource
    rank: bool
    read: bool

    def passages_read(self, most: int) -> int:
        """How many passages a training prompt has, where an arm that reads several reads `most`."""
        return {"mixed": 1, "none": 0}.get(self.passages, most)


PHASES = {
    phase.name: phase
    for phase in (
        Phase("warmup", None, None, "mixed", rank=False, read=True),
        Phase("jmlr", "warmup", None, "live", rank=True, read=True),
        Phase("frozen", "warmup", None, "retriever", rank=False, read=True),
        Phase("bm25", "warmup", None, "bm25", rank=False, read=True),
        Phase("random", "warmup", None, "random", rank=False, read=True),
        Phase("closed_book", "warmup", None, "none", rank=False, read=True),
        # Two stages instead of one: the retriever learns from the warmed-up generator as it stands, then the
        # generator learns from what that retriever finds.
        Phase("separate_retriever", "warmup", None, "live", rank=True, read=False),
        Phase("separate", "warmup", "separate_retriever", "retriever", rank=False, read=True),
    )
}


def chain(arm: str, warmup: bool) -> list[Phase]:
    """The phases an arm needs, in order, itself last; without `warmup` those start from the initial weights.

    >>> [phase.name for phase in chain("separate", warmup=True)]
    ['warmup', 'separate_retriever', 'separate']
    """
    phases: dict[str, Phase] = {}

    def add(name: str | None) -> None:
        if name is None or (name == "warmup" and not warmup):
            return
        add(PHASES[name].generator)
        add(PHASES[name].retriever)
        phases.setdefault(name, PHASES[name])

    add(arm)
    return list(phases.values())


def trained_retriever(arm: str) -> str | None:
    """The phase whose retriever an arm retrieves with when it is evaluated; None is the initial one."""
    phase = PHASES[arm]
    return phase.name if phase.rank else phase.retriever
