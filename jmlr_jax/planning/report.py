"""A plan as a table for people and as JSON for programs, with what to change where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jmlr_jax.config import Config
from jmlr_jax.files import write_text
from jmlr_jax.parallel import distributed
from jmlr_jax.planning.chips import GIB
from jmlr_jax.planning.epoch import hours
from jmlr_jax.planning.estimate import VECTOR_FORWARD
from jmlr_jax.planning.lengths import lengths_of
from jmlr_jax.planning.plan import MEDQA_QUESTIONS, SPARE, Plan, Program, make_plan
from jmlr_jax.planning.search import SCOPED, Look, Search, Trial, applied

NOTES = (
    "Seconds are estimates: cycles of every operation by the TPU compiler over the chip's clock; it has run nowhere.",
    f"Attention kernels have no estimate of the compiler's; theirs is a roofline: products at the chip's peak, then "
    f"{VECTOR_FORWARD} and more vector operations a score, one after the other.",
    "Collectives: bytes over a corner chip's links; those beside other work count as far as they outlast it.",
    "FLOPs that the method needs: every row at its full length, nothing computed twice, causal attention over visible "
    "pairs.",
    f"An epoch is {MEDQA_QUESTIONS:,} questions (MedQA's training set) through the step, without refreshes and "
    "evaluation; dollars are an on-demand price per chip-hour of jmlr_jax/planning/chips.py, an assumption.",
)


def run(
    cfg: Config,
    topology: str | None,
    json_path: str | None,
    lengths: str | None,
    look: Look,
) -> None:
    """Makes and prints a plan; of the configuration, or of the fastest settings that a search finds.

    Args:
        lengths: of :func:`jmlr_jax.planning.lengths.lengths_of`.
        look: whether to search.

    Raises:
        PlanError, ShardingError: see :func:`jmlr_jax.planning.plan.make_plan`; also if nothing that was tried fits.
    """
    console, notes = distributed.console(out=True), distributed.console()
    known = None if lengths is None else lengths_of(lengths)
    flags: dict[str, str] = {}
    if look.axes is not None:
        found = Search(cfg, topology, look, lambda one: notes.print(_trial_line(one)))
        try:
            best = found.run()
        finally:
            if found.trials:
                print_search(found.ranked(), console)
        console.print(Text(f"fastest: {best.words}"))
        cfg, flags = applied(cfg, best.settings)
    notes.print("compiling; minutes for a large model")
    plan = make_plan(cfg, topology, lengths=known, flags=flags)
    print_plan(plan, console)
    if json_path is not None:
        write_text(json_path, json.dumps(to_json(plan), indent=1) + "\n")


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; times are null where the step does not fit, and `breakdown` holds the tables."""
    step, seconds = plan.step, plan.seconds
    estimate, questions = step.estimate, plan.cfg.train.batch_size
    breakdown: dict[str, Any] = {"hbm_gib": _gib(step), "replicated_bytes": dict(plan.replicated)}
    if estimate is not None:
        breakdown["seconds"] = estimate.seconds
        breakdown["flops"] = {
            "recomputed": estimate.recomputed * plan.chips,
            "attention_kernels": estimate.kernel_flops * plan.chips,
            "encode": plan.work.encode * questions,
            "judge": plan.work.judge * questions,
            "read": plan.work.read * questions,
        }
        breakdown["collective_gib"] = {name: size / GIB for name, size in estimate.collective_bytes.items()}
        breakdown["cost_per_epoch_usd_assumed"] = cost(plan)
    for name, program in (("encode_step", plan.encode), ("evaluation_step", plan.evaluate)):
        if program is not None:
            breakdown[name] = {
                "fits": program.fits,
                "hbm_gib": _gib(program),
                "seconds_estimated": program.estimate.total if program.estimate else None,
            }
    if plan.packed is not None and step.typical is not None:
        breakdown["lengths"] = _at_lengths(plan)
    return {
        "fits": step.fits,
        "topology": plan.topology,
        "mesh": plan.mesh,
        "hbm_gib": {"used": step.used / GIB, "available": step.available / GIB},
        "flops": {
            "compiled": estimate.flops * plan.chips if estimate else None,
            "analytic": plan.work.total * questions,
        },
        "step_seconds_estimated": seconds,
        "mfu_estimated": plan.mfu,
        "questions_per_step": questions,
        "epoch_hours_estimated": plan.epoch_hours,
        "breakdown": breakdown,
    }


def _at_lengths(plan: Plan) -> dict[str, Any]:
    """What the plan says at the lengths of its data set."""
    assert plan.lengths is not None and plan.packed is not None and plan.step.typical is not None
    seconds = plan.step.typical.total
    found: dict[str, Any] = {"of": plan.lengths.name, "mean": plan.packed.mean, "width": plan.packed.width}
    found |= {
        "places": {name: list(places) for name, places in plan.packed.places.items()},
        "shares": {name: list(shares) for name, shares in plan.packed.shares.items()},
        "step_seconds_estimated": seconds,
        "seconds": plan.step.typical.seconds,
    }
    found["questions_an_hour"] = plan.cfg.train.batch_size / seconds * 3600
    if plan.encode and plan.encode.fits and plan.evaluate and plan.evaluate.fits:
        found["epoch_hours"] = hours(plan)
        found["epoch_usd_assumed"] = sum(found["epoch_hours"].values()) * plan.chips * plan.chip.price
    return found


def cost(plan: Plan) -> float | None:
    """US dollars of an epoch at the assumed price."""
    return None if plan.epoch_hours is None else plan.epoch_hours * plan.chips * plan.chip.price


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, in plain words, and if not, which settings to turn, the first first."""
    lines = []
    for name, program in (("the joint step", plan.step), ("encoding", plan.encode), ("evaluation", plan.evaluate)):
        if program is None:
            continue
        used, available = program.used / GIB, program.available / GIB
        if program.fits and program.spare >= SPARE:
            lines.append(f"{name} fits: {used:.1f} of {available:.1f} GiB a chip, {program.spare:.0%} spare")
            continue
        word = "fits narrowly" if program.fits else "DOES NOT FIT"
        lines.append(
            f"{name} {word}: {used:.1f} of {available:.1f} GiB a chip. To change it: {'; '.join(knobs(plan, program))}"
        )
    return lines


def knobs(plan: Plan, program: Program) -> list[str]:
    """Settings that lower the memory of a program, those that cost the least time first."""
    cfg, mesh = plan.cfg, plan.mesh
    if program is plan.encode:
        return [f"index.encode_batch={max(cfg.index.encode_batch // 2, 1)}"]
    rows = mesh["data"] * mesh["fsdp"]
    found = []
    held = program.parts["weights"] + program.parts["optimizer"]
    if mesh["data"] > 1:
        found.append(f"mesh.data=1 mesh.fsdp={rows} (weights over more chips)")
    if held > program.available / 2:
        if cfg.generator.lora is None:
            found.append("generator.lora={} (adapters: no gradients and moments of the base)")
        found.append(f"a larger slice: weights and optimizer alone take {held / GIB:.1f} GiB a chip")
    if program is plan.evaluate:
        if cfg.eval.batch_size > rows:
            found.append(f"eval.batch_size={max(cfg.eval.batch_size // 2 // rows, 1) * rows}")
    else:
        pieces = cfg.train.accumulate * 2
        if cfg.generator.llama.remat != "full":
            found.append("generator.llama.remat=full")
        if cfg.train.batch_size % pieces == 0 and cfg.train.batch_size // pieces % rows == 0:
            found.append(f"train.accumulate={pieces}")
        if cfg.retriever.bert.remat != "full":
            found.append("retriever.bert.remat=full")
    heads = cfg.generator.llama.num_kv_heads
    if mesh["fsdp"] % 2 == 0 and heads % (mesh["tensor"] * 2) == 0:
        found.append(f"mesh.fsdp={mesh['fsdp'] // 2} mesh.tensor={mesh['tensor'] * 2} with half the train.batch_size")
    found.append("a lower generator.max_length")
    return found


def print_plan(plan: Plan, console: Console) -> None:
    """Tables of memory, work and time, then the verdict and what the figures rest on."""
    cfg = plan.cfg
    shape = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    console.print(
        Text(plan.topology, style="bold"),
        f": {plan.chips} chips {plan.chip.name}, {shape}; "
        f"{cfg.train.batch_size} questions a step in {cfg.train.accumulate} microbatches",
        sep="",
    )
    console.print(_memory_table(plan))
    if plan.step.estimate is not None:
        console.print(_time_table(plan))
        console.print(_summary_table(plan))
    if plan.packed is not None and plan.step.typical is not None:
        console.print(_lengths_table(plan))
    for line in verdict(plan):
        console.print(line)
    for name, size in plan.replicated:
        console.print(f"every chip holds all of {name}: {size / GIB:.3f} GiB")
    for note in NOTES:
        console.print(note, style="dim")


def print_search(trials: Sequence[Trial], console: Console) -> None:
    """All that was tried, in the order given."""
    heads = ("mesh (data x fsdp x tensor)", "questions", "accumulate", "remat", "on-chip MiB", "HBM GiB")
    table = Table(*heads, "s a step", "MFU", "questions/h", title="search")
    for one in trials:
        s = one.settings
        table.add_row(
            " x ".join(str(s[f"mesh.{name}"]) for name in ("data", "fsdp", "tensor")),
            *(str(s["train.batch_size"]), str(s["train.accumulate"]), s["generator.llama.remat"]),
            *(str(s[SCOPED] >> 10), "" if one.used is None else f"{one.used / GIB:.1f}"),
            *("" if one.seconds is None else f"{one.seconds:.2f}", "" if one.mfu is None else f"{one.mfu:.0%}"),
            f"{one.questions_an_hour:,.0f}" if one.why is None else "does not fit",
        )
    console.print(table)


def _trial_line(one: Trial) -> Text:
    said = f"{one.seconds:.2f} s, {one.questions_an_hour:,.0f} questions/h" if one.why is None else one.why
    return Text(f"{one.words.partition(' jmlr run ')[2]} {SCOPED}={one.settings[SCOPED]}: {said}")


def _gib(program: Program) -> dict[str, float]:
    parts = {name: size / GIB for name, size in program.parts.items()}
    return {**parts, "used": program.used / GIB, "available": program.available / GIB}


def _memory_table(plan: Plan) -> Table:
    programs = {"joint step": plan.step, "encoding": plan.encode, "evaluation": plan.evaluate}
    there = {name: program for name, program in programs.items() if program is not None}
    table = Table("GiB a chip", *there, title="memory, by the compiler")
    for part in ("weights", "optimizer", "batch", "temporaries", "results", "code"):
        table.add_row(part, *(f"{program.parts.get(part, 0) / GIB:.2f}" for program in there.values()))
    table.add_section()
    table.add_row("together", *(f"{program.used / GIB:.2f}" for program in there.values()))
    table.add_row("available", *(f"{program.available / GIB:.2f}" for program in there.values()))
    return table


def _time_table(plan: Plan) -> Table:
    assert plan.step.estimate is not None and plan.seconds is not None
    table = Table("part of the joint step", "seconds, estimated", "share", title="time")
    for name, time in plan.step.estimate.seconds.items():
        table.add_row(name.replace("_", " "), f"{time:.3f}", f"{time / plan.seconds:.0%}")
    table.add_section()
    table.add_row("together", f"{plan.seconds:.3f}", "")
    return table


def _summary_table(plan: Plan) -> Table:
    estimate, seconds, hours = plan.step.estimate, plan.seconds, plan.epoch_hours
    assert estimate is not None and seconds is not None and hours is not None
    needed, compiled = plan.work.total * plan.cfg.train.batch_size, estimate.flops * plan.chips
    once = compiled - estimate.recomputed * plan.chips
    table = Table("", "estimated", title="work and cost")
    table.add_row("TFLOP a step by the method", f"{needed / 1e12:,.0f} ({plan.work.total / 1e12:.0f} a question)")
    table.add_row(
        "TFLOP a step compiled", f"{compiled / 1e12:,.0f}, of which recomputed {(compiled - once) / 1e12:,.0f}"
    )
    table.add_row("compiled without recomputation / method", f"{once / needed:.2f}")
    table.add_row("model-FLOPs utilisation", f"{plan.mfu:.1%}")
    moved = sum(estimate.collective_bytes.values())
    table.add_row(
        "collectives, GiB received by a chip", f"{moved / GIB:.1f}, waited for {estimate.exposed:.0%} of their time"
    )
    table.add_row("questions an hour", f"{plan.cfg.train.batch_size / seconds * 3600:,.0f}")
    table.add_row(f"epoch of MedQA ({MEDQA_QUESTIONS:,})", f"{hours:.2f} h, {cost(plan):,.0f} US dollars assumed")
    for name, program in (("encoding", plan.encode), ("evaluation", plan.evaluate)):
        if program is not None and program.estimate is not None:
            rows = plan.cfg.index.encode_batch if name == "encoding" else plan.cfg.eval.batch_size
            unit = "passages" if name == "encoding" else "questions"
            time = program.estimate.total
            table.add_row(f"{name}, a batch of {rows}", f"{time:.3f} s, {rows / time * 3600:,.0f} {unit} an hour")
    return table


def _lengths_table(plan: Plan) -> Table:
    found = _at_lengths(plan)
    assert plan.packed is not None
    table = Table("", "estimated", title=Text(f"at the lengths of {found['of']}"))
    for name, what in (("judge", "judging"), ("read", "reading")):
        mean, width = plan.packed.mean[name], plan.packed.width[name]
        table.add_row(f"tokens of a {what} prompt", f"{mean:,.0f} of {width:,}")
        often = zip(plan.packed.places[name], plan.packed.shares[name], strict=True)
        said = ", ".join(f"{place:.0%}: {share:.0%}" for place, share in often)
        table.add_row(f"steps whose {what} computes for so many of the places", said)
    table.add_row("seconds a step", f"{found['step_seconds_estimated']:.3f}")
    table.add_row("questions an hour", f"{found['questions_an_hour']:,.0f}")
    if "epoch_hours" in found:
        table.add_section()
        for name, value in found["epoch_hours"].items():
            table.add_row(f"epoch: {name}", f"{value:.2f} h")
        together = sum(found["epoch_hours"].values())
        table.add_row("epoch", f"{together:.2f} h, {found['epoch_usd_assumed']:,.0f} US dollars assumed")
    return table
