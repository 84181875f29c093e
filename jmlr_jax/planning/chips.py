"""What a chip can do and costs: the yardsticks that a plan measures a program by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      peak: bfloat16 FLOP/s.
      clock: Hz of the cycles that the compiler estimates.
      hbm: bytes of memory that a program can use; the rest belongs to the system.
      bandwidth: bytes/s of memory.
      link, links: bytes/s of one link in one direction; how many links even a corner of a slice has.
      fill: share of the matrix unit that heads of width 128 fill; it is 256 wide on v6e.
      price: US dollars for a chip-hour on demand: an assumption, to be replaced by your own.
      megacore: whether the chip's two cores are one device of the program.
    """

    name: str
    peak: float
    clock: float
    hbm: float
    bandwidth: float
    link: float
    links: int
    fill: float
    price: float
    megacore: bool = False


GIB = 2**30
# Peaks, bandwidths and links as published for each generation; usable memory as the compiler states it.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 1.05e9, 30.75 * GIB, 1.23e12, 45e9, 3, 1.0, 3.22, megacore=True),
    "v5e": Chip("TPU v5e", 197e12, 1.5e9, 15.75 * GIB, 0.82e12, 45e9, 2, 1.0, 1.20),
    "v5p": Chip("TPU v5p", 459e12, 1.75e9, 95.74 * GIB, 2.77e12, 90e9, 3, 1.0, 4.20),
    "v6e": Chip("TPU v6e", 918e12, 1.75e9, 31.25 * GIB, 1.64e12, 90e9, 2, 0.5, 2.70),
}
