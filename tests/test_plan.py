"""Plans by the real TPU compiler for a small model; the reading of compiled programs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jmlr_jax import cli, config_io
from jmlr_jax.config import Config
from jmlr_jax.config_models import EncoderLoraConfig
from jmlr_jax.nn.abstract import shard_bytes
from jmlr_jax.parallel import libtpu
from jmlr_jax.parallel.sharding import ShardingError
from jmlr_jax.planning import hlo, plan, programs
from jmlr_jax.planning import report as plan_report
from jmlr_jax.planning.chips import CHIPS, GIB
from jmlr_jax.planning.estimate import estimate, part
from jmlr_jax.planning.lengths import Lengths, lengths_of, packed

SMALL = {
    "retriever": {
        "dim": 128,
        "query_length": 32,
        "passage_length": 64,
        "bert": {"vocab_size": 512, "hidden_size": 128, "max_positions": 64, "dtype": "bfloat16", "remat": "full"},
    },
    "generator": {
        "llama": {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 2,
            "num_kv_heads": 2,
            "max_positions": 512,
            "tie_embeddings": False,
            "dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "remat": "full",
        },
        "copy_init": 0,
        "lora": {"rank": 8},
        "passage_length": 112,
        "question_length": 127,
        "answer_length": 16,
        "max_length": 512,
    },
    "train": {
        "batch_size": 8,
        "candidates": 6,
        "mix": {"index": 6, "bm25": 0, "random": 0},
        "sampled": 4,
        "read_passages": 3,
    },
    "mesh": {"fsdp": 2, "tensor": 2, "topology": "v5e:2x2"},
}
KEYS = {
    "fits",
    "topology",
    "mesh",
    "hbm_gib",
    "flops",
    "step_seconds_estimated",
    "mfu_estimated",
    "questions_per_step",
    "epoch_hours_estimated",
    "breakdown",
}


# Every judging prompt has 1 + 50 + 60 + 4 of 256 tokens, every reading prompt 1 + 3 * 50 + 60 + 4 of 480.
HALF = Lengths("half", *(np.array([count] * 2) for count in (50, 60, 4)), corpus=1000, train=80, test=64)


def small(**train: Any) -> Config:
    return Config.model_validate(SMALL | {"train": SMALL["train"] | train})


@pytest.fixture(scope="module")
def made() -> plan.Plan:
    return plan.make_plan(small(), whole=False, lengths=HALF)


@pytest.mark.exhaustive
def test_a_plan_by_the_tpu_compiler(made: plan.Plan) -> None:
    """Memory adds up, every part of the step is found, and the products are those of the method, as far as said."""
    found = plan_report.to_json(made)
    assert found.keys() == KEYS and json.loads(json.dumps(found)) == found
    assert found["fits"] and found["topology"] == "v5e:2x2" and found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert found["questions_per_step"] == 8 and found["hbm_gib"]["available"] == pytest.approx(15.75)
    assert 0 < found["hbm_gib"]["used"] < 1
    estimate = made.step.estimate
    assert estimate is not None
    for name in ("encode", "judge", "read_forward", "read_recompute", "read_backward", "update", "attention_kernels"):
        assert estimate.seconds[name] > 0, name
    assert found["step_seconds_estimated"] == pytest.approx(sum(found["breakdown"]["seconds"].values()))
    once = found["flops"]["compiled"] - found["breakdown"]["flops"]["recomputed"]
    assert 0.9 < once / found["flops"]["analytic"] < 1.5  # small heads and whole blocks of attention weigh more here
    # Forward and backward kernels of reading, forward ones of judging, and the forward ones computed again.
    assert estimate.kernel_flops > 0 and estimate.recomputed > 0
    assert {"all-gather", "all-reduce"} & estimate.collective_bytes.keys()
    assert found["breakdown"]["replicated_bytes"] == {}


@pytest.mark.exhaustive
def test_at_the_lengths_of_a_data_set(made: plan.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    """Short prompts are packed into the fewest places that the program chooses from, and take their time."""
    assert made.packed is not None and made.step.typical is not None and made.step.estimate is not None
    assert made.packed.mean == {"judge": 115, "read": 215} and made.packed.width == {"judge": 256, "read": 480}
    assert made.packed.places["judge"] == pytest.approx((0.6, 0.8, 1), abs=0.02)
    assert made.packed.shares == {"judge": (1, 0, 0), "read": (1, 0, 0)}
    full, typical = made.step.estimate, made.step.typical
    for name in ("judge", "read_forward", "read_backward"):
        assert 0.5 * full.seconds[name] < typical.seconds[name] < 0.97 * full.seconds[name], name
    assert typical.seconds["encode"] == full.seconds["encode"] and typical.flops < 0.9 * full.flops
    found = plan_report.to_json(replace(made, encode=made.step, evaluate=made.step))["breakdown"]["lengths"]
    steps, refreshes = 80 // 8, 1  # of the corpus, in batches of 128
    assert found["epoch_hours"]["steps"] == pytest.approx(steps * typical.total / 3600)
    assert found["epoch_hours"]["refreshes"] == pytest.approx(refreshes * 8 * full.total / 3600)
    assert found["epoch_hours"]["compilation"] > 0 and found["questions_an_hour"] > 8 / full.total * 3600
    from rich.console import Console

    plan_report.print_plan(made, Console(width=200))
    assert "at the lengths of half" in capsys.readouterr().out


def test_lengths_are_of_a_run_or_of_medqa(tiny_data: Path, tmp_path: Path) -> None:
    medqa = config_io.load("paper_7b_v5e16")
    found = packed(lengths_of("medqa"), medqa, 16)
    assert found.width == {"judge": 768, "read": 2688} and 450 < found.mean["judge"] < 550
    assert all(sum(shares) == pytest.approx(1) for shares in found.shares.values())
    shutil.copytree(tiny_data, tmp_path / "data")
    own = lengths_of(str(tmp_path))
    assert (own.corpus, own.train, own.test) == (684, 1512, 56) and own.passages.min() > 2 and own.questions.max() <= 80
    with pytest.raises(programs.PlanError, match="neither medqa nor a directory with prepared data"):
        lengths_of(str(tmp_path / "nowhere"))


@pytest.mark.exhaustive
def test_a_plan_with_adapters_on_the_retriever(made: plan.Plan) -> None:
    """It compiles, cut as a whole retriever is, and keeps moments of the adapters and the projection alone."""
    cfg = small()
    cfg = cfg.model_copy(update={"retriever": cfg.retriever.model_copy(update={"lora": EncoderLoraConfig()})})
    found = plan.make_plan(cfg, whole=False)
    assert found.step.fits and found.replicated == [] and found.work.encode < made.work.encode
    assert found.step.parts["optimizer"] < made.step.parts["optimizer"] / 2
    assert found.step.estimate is not None and found.step.estimate.seconds["encode"] > 0


@pytest.mark.exhaustive
def test_layers_of_both_kinds(made: plan.Plan) -> None:
    """Gemma's and ModernBERT's: a kernel for each kind, of which a layer's flag takes one; remat sees into both: what
    attention keeps is not computed again."""
    kinds = {"sliding_window": 100, "layer_kinds": ("window", "full"), "window_rope_theta": 1e4}
    tree = small().model_dump()
    gemma = {"block": "gemma", "qk_norm": True, "tie_embeddings": True, "remat": "attention", "num_layers": 3}
    tree["generator"]["llama"] |= kinds | gemma
    tree["generator"]["lora"]["targets"] = ("q", "k", "v", "o", "gate", "up", "down")
    tree["retriever"]["bert"] |= kinds | {"block": "modernbert", "num_layers": 3}
    tree["retriever"] |= {"augment_queries": False}
    found = plan.make_plan(Config.model_validate(tree), whole=False)
    assert found.step.fits and found.step.estimate is not None and made.step.estimate is not None
    whole, kept = made.step.estimate.kernel_flops / 2, found.step.estimate.kernel_flops / 3
    assert 0.5 * whole < kept < 0.95 * whole, "a layer's kernels without those of the recomputation"


@pytest.mark.exhaustive
def test_the_table_says_what_is_estimated(made: plan.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    whole = replace(made, replicated=[("state.params.generator.embed", GIB)])
    plan_report.print_plan(whole, Console(width=200))
    shown = capsys.readouterr().out
    assert "the joint step fits" in shown and "seconds, estimated" in shown and "it has run nowhere" in shown
    assert "an on-demand price" in shown and "read recompute" in shown
    assert "every chip holds all of state.params.generator.embed: 1.000 GiB" in shown


def test_evaluation_is_planned_as_wide_as_its_prompts_can_be() -> None:
    """Three passages of 112, a question of 127 and 16 tokens of answer in 480 slots of the cache; 512 are allowed."""
    cfg = small()
    source = programs.evaluate_program(cfg, plan.make_mesh(cfg.mesh, plan.slice_of("v5e:2x2")[1]))
    text = source.lower(*source.arguments).as_text()
    layers, rows = 2, cfg.eval.batch_size
    assert f"tensor<{layers}x{rows}x480x2x128xbf16>" in text and f"tensor<{layers}x{rows}x512x2x128xbf16>" not in text


@pytest.mark.exhaustive
def test_what_does_not_fit_names_a_knob(made: plan.Plan) -> None:
    """The compiler's refusal is a plan too: what it would take, no times, and settings to turn."""
    cfg = small(batch_size=8)
    llama = cfg.generator.llama.model_copy(update={"remat": "none", "hidden_size": 16384, "num_heads": 128})
    wide = cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"llama": llama})})
    mesh = plan.make_mesh(cfg.mesh, plan.slice_of("v5e:2x2")[1])
    huge = jax.ShapeDtypeStruct((2**18, 2**18), jnp.bfloat16, sharding=jax.NamedSharding(mesh, P("fsdp")))
    source = programs.Source(jax.jit(lambda x: (x @ x.T).sum()).lower, (huge,), (), ())
    program = plan.compile_program(source, CHIPS["v5e"], (None,))
    assert not program.fits and program.used > program.available == pytest.approx(15.75 * GIB)
    refused = replace(made, cfg=wide, step=program)
    found = plan_report.to_json(refused)
    assert found.keys() == KEYS and found["fits"] is False
    assert found["step_seconds_estimated"] is found["mfu_estimated"] is found["epoch_hours_estimated"] is None
    (line,) = plan_report.verdict(refused)
    assert "DOES NOT FIT" in line and "generator.llama.remat=full" in line and "train.accumulate=2" in line
    cramped = replace(made.step, used=0.97 * made.step.available)
    assert "fits narrowly" in plan_report.verdict(replace(made, step=cramped))[0]


def test_errors_name_the_setting() -> None:
    with pytest.raises(programs.PlanError, match="mesh.topology"):
        plan.make_plan(small().model_copy(update={"mesh": small().mesh.model_copy(update={"topology": None})}))
    with pytest.raises(programs.PlanError, match="generation 'v9' is not one of v4, v5e"):
        plan.make_plan(small(), "v9:2x2")
    with pytest.raises(programs.PlanError, match="topology 'v5e:3x1'"):
        plan.make_plan(small(), "v5e:3x1")
    with pytest.raises(ShardingError, match="train.batch_size / train.accumulate=7 is not a multiple"):
        plan.make_plan(small(batch_size=7))
    unknown = config_io.load(None, ["generator.tokenizer=models/some", "generator.llama.vocab_size=0"])
    with pytest.raises(programs.PlanError, match="generator.llama.vocab_size=0.*models/some"):
        programs.resolved(unknown)


@pytest.mark.exhaustive
def test_command(made: plan.Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(plan_report, "make_plan", lambda cfg, topology, lengths, flags: replace(made, cfg=cfg))
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "--config", "smoke", "--topology", "v5e:2x2", "--json", str(out)]) == 0
    assert json.loads(out.read_text()).keys() == KEYS
    assert "the joint step fits" in capsys.readouterr().out


# ---------------------------------------------------------------- compiled programs


def test_flags_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user set stands; what he did not name is added, once."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=1")
    libtpu.set_flags()
    libtpu.set_flags()
    (flag, value), *more = libtpu.FLAGS.items()
    rest = [f"--{name}={setting}" for name, setting in more]
    assert os.environ["LIBTPU_INIT_ARGS"].split() == ["--xla_other=1", f"--{flag}={value}", *rest]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{flag}=16384")
    libtpu.set_flags()
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [f"--{flag}=16384", *rest]


def test_loops_products_and_collectives_are_counted() -> None:
    """A loop of ten turns over sharded weights, compiled for a slice: products are exact, the gather is seen."""
    mesh = plan.make_mesh(small().mesh.model_copy(update={"fsdp": 4, "tensor": 1}), plan.slice_of("v5e:2x2")[1])

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=jax.NamedSharding(mesh, P("fsdp")))

    def turns(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w @ w.T), None), x, None, length=10)[0]

    compiled = jax.jit(turns).lower(shape(1024, 512), shape(512, 2048)).compile()
    operations = list(hlo.parse(compiled.as_text()).operations())
    assert sum(o.flops * o.times for o in operations) == 10 * 2 * 2 * 256 * 512 * 2048
    assert any(o.times == 10 and o.cycles > 0 for o in operations)
    gathered = [o for o in operations if o.kind == "all-gather"]
    assert gathered and {o.bytes for o in gathered} == {3 / 4 * 512 * 2048 * 2}


def test_a_loop_that_may_end_early_counts_in_full() -> None:
    """As generation has one: up to so many tokens, or until every row has ended."""
    (device, *_) = plan.slice_of("v5e:2x2")[1]
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=[device])

    def grow(x: jax.Array) -> jax.Array:
        more = lambda state: (state[0] < 7) & ~jnp.all(state[1] > 9)  # noqa: E731
        return jax.lax.while_loop(more, lambda state: (state[0] + 1, state[1] @ state[1]), (2, x))[1]

    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.NamedSharding(mesh, P()))
    operations = hlo.parse(jax.jit(grow).lower(x).compile().as_text()).operations()
    assert max(o.times for o in operations if o.flops) == 5


CONVOLUTION = """
HloModule m

%inner (p: f32[8,4]) -> f32[8,16] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %w = f32[4,16]{1,0} constant({...})
  ROOT %c = f32[8,16]{1,0} convolution(%p, %w), dim_labels=bf_io->bf
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %f = f32[8,16]{1,0} fusion(%x), kind=kOutput, calls=%inner, metadata={op_name="jit(f)/jvp(judge)/dot"}, CYCLES
  %g = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), dimensions={0}
  %h = f32[8,4]{1,0} all-gather-done(%g)
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%n, %x)
}

%test (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %last = s32[] constant(7)
  ROOT %less = pred[] compare(%n, %last), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(2)
  %s = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%s), condition=%test, body=%body, metadata={op_name="jit(f)/while"}
  %sum = f32[8,4]{1,0} all-reduce(%a), to_apply=%add
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
""".replace("CYCLES", 'backend_config={"window_config":{"estimated_cycles":"3000"}}')


def test_reading_a_program_by_hand() -> None:
    product, gather, total = hlo.parse(CONVOLUTION).operations()
    assert (product.flops, product.times, product.cycles) == (2 * 8 * 4 * 16, 5, 3000)
    assert product.loop.startswith("jit(f)/while") and part(product.where) == "judge"
    assert gather.kind == "all-gather" and gather.overlapped and gather.times == 5
    assert total.kind == "all-reduce" and not total.overlapped and total.bytes == 2 * 8 * 4 * 4 and total.times == 1
    chip = replace(CHIPS["v5e"], clock=1000.0, link=1.0, links=2)
    found = estimate([product, gather, total], chip)
    assert found.seconds["judge"] == 15.0 and found.flops == 5 * 2 * 8 * 4 * 16
    beside = 5 * gather.bytes / 2
    assert found.seconds["collectives_exposed"] == pytest.approx(total.bytes / 2 + max(0, beside - 15))


def test_pairs_under_a_window() -> None:
    """Three taps over six places with one of padding: the two ends have two."""
    assert hlo._window_pairs(6, 3, 6, {"size": "3", "pad": "1_1"}) == 16
    # A batch of four written as a convolution: four taps over four spread-out places, one meets each.
    spread = {"size": "4", "stride": "3", "pad": "0_0", "lhs_dilate": "4"}
    assert hlo._window_pairs(4, 4, 4, spread) == 4


@pytest.mark.parametrize("name", sorted(config_io.presets()))
def test_presets_that_name_a_slice_divide_over_it(name: str) -> None:
    cfg = config_io.load(name)
    if cfg.mesh.topology is None:
        assert not name.startswith("jmlr_"), f"{name} says mesh.topology"
        return
    _, devices = plan.slice_of(cfg.mesh.topology)
    mesh = plan.make_mesh(cfg.mesh, devices)
    arguments = programs.step_program(cfg, mesh).arguments
    # What is only known after minutes of compiling stands in docs/benchmarks.md.
    assert shard_bytes(arguments) < 0.95 * CHIPS[cfg.mesh.topology.partition(":")[0]].hbm
