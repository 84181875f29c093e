"""Plans of all presets that name a slice, as the table of docs/benchmarks.md and the `# Plan:` line of each preset.

    python benchmarks/plans.py OUT [paper_7b_v5e16 ...] [--step-only] [--headers] [key=value ...]

Each preset takes minutes of one core. A plan is kept in OUT/NAME.json and not made again; delete the file to make it
again. `--headers` writes what was found into the presets.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import jax

from jmlr_jax import config_io
from jmlr_jax.planning.plan import make_plan
from jmlr_jax.planning.report import to_json

COLUMNS = (
    "preset",
    "HBM GiB a chip",
    "spare",
    "PFLOP a step by the method",
    "compiled / method",
    "recomputed",
    "collectives GiB",
    "s a step",
    "MFU",
    "questions a step",
    "questions/h",
    "h an epoch",
    "$",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("words", nargs="*", help="names of presets (default: all with a slice) and key=value")
    parser.add_argument("--step-only", action="store_true", help="leave out the encoding and evaluation programs")
    parser.add_argument("--headers", action="store_true")
    args = parser.parse_intermixed_args()
    jax.config.update("jax_platforms", "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    overrides = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word] or [
        name for name in sorted(config_io.presets()) if config_io.load(name).mesh.topology
    ]
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for name in names:
        file = args.out / f"{name}.json"
        if not file.exists():
            started = time.monotonic()
            plan = to_json(make_plan(config_io.load(name, overrides), whole=not args.step_only))
            plan["compile_seconds"] = time.monotonic() - started
            file.write_text(json.dumps(plan, indent=1) + "\n")
        plan = json.loads(file.read_text())
        print(row(name, plan), flush=True)
        if args.headers:
            preset = config_io.presets()[name]
            preset.write_text(re.sub(r"(?m)^# Plan: .*$", f"# Plan:    {line(plan)}", preset.read_text()))


def row(name: str, plan: dict[str, Any]) -> str:
    """One line of the table."""
    used, available = plan["hbm_gib"]["used"], plan["hbm_gib"]["available"]
    memory = f"{used:.1f} of {available:.1f}"
    if not plan["fits"]:
        return f"| `{name}` | {memory}: does not fit |" + " |" * (len(COLUMNS) - 2)
    flops, again = plan["flops"], plan["breakdown"]["flops"]["recomputed"]
    values = (
        f"`{name}`",
        memory,
        f"{1 - used / available:.0%}",
        f"{flops['analytic'] / 1e15:.2f}",
        f"{(flops['compiled'] - again) / flops['analytic']:.2f}",
        f"{again / flops['analytic']:.0%}",
        f"{sum(plan['breakdown']['collective_gib'].values()):.1f}",
        f"{plan['step_seconds_estimated']:.2f}",
        f"{plan['mfu_estimated']:.1%}",
        f"{plan['questions_per_step']}",
        f"{plan['questions_per_step'] / plan['step_seconds_estimated'] * 3600:,.0f}",
        f"{plan['epoch_hours_estimated']:.2f}",
        f"{plan['breakdown']['cost_per_epoch_usd_assumed']:.0f}",
    )
    return "| " + " | ".join(values) + " |"


def line(plan: dict[str, Any]) -> str:
    """What stands in a preset's header."""
    used, available = plan["hbm_gib"]["used"], plan["hbm_gib"]["available"]
    if not plan["fits"]:
        return f"does not fit: {used:.1f} of {available:.1f} GiB a chip"
    return (
        f"{used:.1f} of {available:.1f} GiB a chip, {plan['step_seconds_estimated']:.2f} s a step, "
        f"{plan['mfu_estimated']:.0%} utilisation, {plan['epoch_hours_estimated']:.1f} h an epoch (estimates)"
    )


if __name__ == "__main__":
    main()
