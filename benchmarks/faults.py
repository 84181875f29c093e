"""What breaks while running, tried on purpose: kills, damaged files, and input that nobody wrote.

    python benchmarks/faults.py kills   [--cycles 6] [--seed 0] [--folder DIR]
    python benchmarks/faults.py damages [--count 300] [--seed 0] [--folder DIR]
    python benchmarks/faults.py fuzz    [--count 10000] [--seed 0] [--folder DIR]

``kills``: prepare, index, train (with refreshes), eval and export of a small run, each killed with SIGKILL at random
moments and given again, once by two processes in every cycle; metrics, weights, evaluation and export must be those of
a run that nobody touched. ``damages``: one file of a finished run is cut, flipped, swapped, deleted or replaced by
another run's, and the command that reads it must refuse in one line or end with the same bytes. ``fuzz``: mutated files
of questions, passages, configurations, overrides, tokenizers, models and index cards; nothing but errors of ours may
come of them, in time, and no record may be lost without a word.

A campaign that is started again in its folder goes on where it was. Exit status 1 if anything was lost. The results
are in DIR and, of a whole campaign, in ``benchmarks/results/faults_NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_damages import damages
from faults_fuzz import fuzz
from faults_kills import kills

RESULTS = Path(__file__).resolve().parent / "results"
CAMPAIGNS: dict[str, tuple[Callable[[Path, int, int], dict[str, Any]], str, int]] = {
    "kills": (kills, "cycles", 6),
    "damages": (damages, "count", 300),
    "fuzz": (fuzz, "count", 10_000),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    for name in ("cycles", "count"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    args = parser.parse_args()
    run, size, default = CAMPAIGNS[args.campaign]
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="faults_"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    asked = getattr(args, size) or default
    found = {"campaign": args.campaign, size: asked, "seed": args.seed, **run(folder, asked, args.seed)}
    text = json.dumps(found, indent=1) + "\n"
    (folder / f"{args.campaign}.json").write_text(text)
    if asked >= default:
        (RESULTS / f"faults_{args.campaign}.json").write_text(text)
    print(text)
    sys.exit(1 if found["lost"] else 0)


if __name__ == "__main__":
    main()
