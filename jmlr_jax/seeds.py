"""One way to derive a seed: from the run's and a purpose, so that no two draws of a run share their numbers."""

from __future__ import annotations

import hashlib


def derived(seed: int, *purpose: str | int) -> int:
    """A seed below 2**31 for one purpose, the same on every machine.

    Args:
      seed: the run's.
      purpose: what is drawn, and where there are several, which of them.

    >>> derived(0, "questions"), derived(0, "dropout"), derived(1, "questions")
    (320987639, 95890286, 1994943561)
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1
