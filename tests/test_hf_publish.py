"""``jmlr export`` of whole runs: published weights in, trained weights out, and back in again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_colbert
import hf_models
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from runs import one_device

from jmlr_jax import cli, config_io
from jmlr_jax.commands import export as publish
from jmlr_jax.commands.pipeline import prepare_data
from jmlr_jax.config import Config
from jmlr_jax.config_models import BertConfig, LlamaConfig, LoraConfig
from jmlr_jax.data.tokenizers import load_tokenizer, train_generator_tokenizer
from jmlr_jax.errors import JmlrError
from jmlr_jax.hf.load import load_generator, load_retriever
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate
from jmlr_jax.nn.lora import bind, merge
from jmlr_jax.run.artifact import Recipe
from jmlr_jax.run.open import Run
from jmlr_jax.run.phases import PHASES
from jmlr_jax.run.weights import begin, load_weights, save_weights, seal_weights

ORGANS = "kidney liver heart lung skin brain bone eye".split()  # in letters: the small tokenizers know no digits
QUESTIONS = [
    {"id": f"q{i}", "question": f"what hardens the {organ}?", "options": {"A": f"drug {i}", "B": "age"}, "answer": "A"}
    for i, organ in enumerate(ORGANS[:6])
]
PASSAGES = [
    {"id": f"p{i}", "title": "Organ", "text": f"The {organ} is hardened by age, less by drug {i}."}
    for i, organ in enumerate(ORGANS)
]
LLAMA = LlamaConfig(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, max_positions=512)
BERT = BertConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_positions=48)


def base_config(folder: Path) -> dict[str, Any]:
    """Prepared data of six questions; the models start from random weights."""
    for name, rows in (("train", QUESTIONS[2:]), ("test", QUESTIONS[:2]), ("corpus", PASSAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"questions": "jsonl", "leakage_ngram": 0, "on_error": "stop"}
    data |= {f"{name}_path": str(folder / f"{name}.jsonl") for name in ("train", "test", "corpus")}
    return {
        "run_dir": str(folder / "run"),
        "data": data,
        "train": {"warmup": {"steps": 0}},
        "retriever": {"bert": BERT.model_dump(), "dim": 12, "query_length": 20, "passage_length": 32},
        "generator": {
            "llama": LLAMA.model_dump(),
            "copy_init": 0,
            "question_length": 96,
            "passage_length": 64,
            "answer_length": 24,
        },
        "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
    }


def moved(x: jax.Array) -> jax.Array:
    """Other values, in the same place."""
    return jax.device_put(np.asarray(x) + 0.02 * np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype), x.sharding)


def trained(cfg: Config, arm: str = "jmlr") -> tuple[Run, dict[str, Any]]:
    """A run whose arm ends with weights that differ from the first ones."""
    prepare_data(cfg)
    run = Run.open(cfg)
    begin(run, PHASES[arm])
    weights = run.initial_weights()
    for part in ("retriever", "generator"):
        weights[part] = jax.tree.map(moved, weights[part])
        save_weights(run.directory / "arms" / arm / "weights" / part, weights[part])
    made = Recipe.read(run.directory / "arms" / arm)
    assert made is not None
    seal_weights(run.directory / "arms" / arm, made.digest, {p: weights[p] for p in ("retriever", "generator")})
    return run, weights


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    cfg = Config.model_validate(base_config(tmp_path_factory.mktemp("scratch")))
    return trained(cfg)


def equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


@pytest.mark.exhaustive
def test_from_random_weights(scratch: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    """No base model: merged weights and both retriever layouts, each the source of another run, and no adapters."""
    run, weights = scratch
    out = tmp_path / "out"
    assert cli.main(["export", run.cfg.run_dir, str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "colbert", "generator", "pylate"]
    cfg, back = load_generator(str(out / "generator"), LLAMA)
    equal(back, weights["generator"])
    assert cfg.vocab_size == run.llama.vocab_size
    for layout in ("colbert", "pylate"):
        again, params = load_retriever(str(out / layout), run.cfg.retriever, jax.random.key(0))
        equal(params, weights["retriever"])
        assert again == run.retriever
    for folder in ("generator", "colbert", "pylate"):
        assert "Not for patient care" in (out / folder / "README.md").read_text()
    loaded = transformers.AutoTokenizer.from_pretrained(out / "generator")
    assert loaded.get_vocab() == load_tokenizer(run.prepared.tokenizer_dir("generator")).get_vocab()


def test_the_card_holds_what_was_measured(scratch: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = scratch
    summary = {"arm": "jmlr", "n": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9, "chance": 0.5}
    summary |= {"generation": {"accuracy": 0.25, "low": 0.0, "high": 0.75, "unparsed": 1}}
    place = run.directory / "eval" / "test" / "jmlr"
    place.mkdir(parents=True)
    (place / "summary.json").write_text(json.dumps(summary))
    publish.export_run(run.cfg, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| jmlr | 2 | 50.0% | 10.0% to 90.0% | 25.0% | 0.0% to 75.0% | 1 |" in card
    assert "train 4" in card and "Passages: 8;" in card


def test_a_failed_export_leaves_nothing(
    scratch: tuple[Run, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = scratch

    def fail(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "write_pylate", fail)
    assert cli.main(["export", run.cfg.run_dir, str(tmp_path / "out")]) == 2
    assert "no space left; free some" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert cli.main(["export", run.cfg.run_dir, str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "out" / "mine").exists()


def test_what_cannot_be_exported(scratch: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = scratch
    with pytest.raises(JmlrError, match="bm25.*has not been trained to its end"):
        publish.export_run(run.cfg, tmp_path / "out", arm="bm25")
    (tmp_path / "many" / "seed_0").mkdir(parents=True)
    with pytest.raises(JmlrError, match="holds the runs seed_0; name one of them"):
        publish.export_run(run.cfg.model_copy(update={"run_dir": str(tmp_path / "many")}), tmp_path / "out")
    with pytest.raises(JmlrError, match="no such run"):
        publish.export_run(run.cfg.model_copy(update={"run_dir": str(tmp_path / "none")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_from_published_weights_with_adapters(tmp_path: Path) -> None:
    """A decoder in bfloat16 and a ColBERT in, adapters trained, everything out: the merged model and PEFT on the base
    give the logits that our model gives with its adapters bound."""
    texts = [row["text"] for row in PASSAGES] + [row["question"] for row in QUESTIONS]
    base = tmp_path / "base"
    train_generator_tokenizer(texts, 300, str(base))
    hf_models.decoder("qwen3", base, torch.bfloat16, vocab_size=304, max_position_embeddings=512, head_dim=8)
    (base / "LICENSE").write_text("terms")
    (base / "tokenizer.model").write_bytes(b"pieces")
    hf_colbert.export("published", tmp_path)
    raw = base_config(tmp_path)
    raw["generator"] |= {
        "source": str(base),
        "tokenizer": str(base),
        "lora": LoraConfig(rank=2, targets=("q", "o", "up")),
    }
    raw["generator"]["llama"] = {"max_positions": 512, "param_dtype": "bfloat16"}
    colbert = str(tmp_path / "colbert")
    raw["retriever"] |= {"source": colbert, "tokenizer": colbert, "query_marker": "[unused0]"}
    raw["retriever"] |= {"passage_marker": "[unused1]", "bert": {"max_positions": 48}}
    run, weights = trained(Config.model_validate(raw), "jmlr")
    out = tmp_path / "out"
    publish.export_run(run.cfg, out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapters", "colbert", "generator", "pylate"]
    assert (out / "generator" / "LICENSE").read_text() == (out / "adapters" / "LICENSE").read_text() == "terms"

    for kept in ("generator", "adapters"):
        assert (out / kept / "tokenizer.model").read_bytes() == b"pieces"

    lora_cfg = run.cfg.generator.lora
    _, back = load_generator(str(out / "generator"), LlamaConfig(max_positions=512, param_dtype="bfloat16"))
    equal(back, merge(weights["base"], weights["generator"], lora_cfg))
    ids, length = np.random.default_rng(0).integers(3, 300, (2, 9)), np.full(2, 9)
    adapters = bind(weights["generator"], lora_cfg)
    hidden = F.llama_hidden(weights["base"], run.llama, ids, length, adapters=adapters)
    ours = np.asarray(F.llama_logits(weights["base"], run.llama, hidden, adapters=adapters))
    kind = transformers.AutoModelForCausalLM
    with torch.no_grad():
        plain = kind.from_pretrained(base, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(plain, out / "adapters")(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours, adapted, atol=1e-4)
    raw_before, raw_after = (json.loads((folder / "config.json").read_text()) for folder in (base, out / "generator"))
    assert raw_after == raw_before  # class, dtype, begin and end tokens: all as published
    again, params = load_retriever(str(out / "colbert"), run.cfg.retriever, jax.random.key(0))
    equal(params, weights["retriever"])
    assert again == run.retriever and config_io.load(str(run.directory / "config.yaml")) == run.cfg


# Large steps: three of them move every weight by far more than rounding.
TRAINING = {
    "steps": 3,
    "batch_size": 4,
    "candidates": 4,
    "mix": {"index": 2, "bm25": 1, "random": 1},
    "sampled": 2,
    "read_passages": 2,
    "refresh_steps": 0,
    "help_margin": 0.0,
    "dev_questions": 0,
    "warmup": {"steps": 0},
    "retriever": {"learning_rate": 0.01, "warmup_steps": 0},
    "generator": {"learning_rate": 0.03, "warmup_steps": 0},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "colbert"), [("llama", "published"), ("gemma3", "modern")])
def test_a_run_that_was_trained(family: str, colbert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights, prepared data, the joint step, export, all by commands. transformers then answers 20 prompts
    of this data with the tokens that the trained weights give here, PEFT has their logits, sentence-transformers and
    colbert-ai their scores."""
    one_device(monkeypatch)
    base, out, published = tmp_path / "base", tmp_path / "out", hf_colbert.CONFIGS[colbert]
    train_generator_tokenizer(
        [row["text"] for row in PASSAGES] + [row["question"] for row in QUESTIONS], 300, str(base)
    )
    hf_models.decoder(family, base, vocab_size=304, max_position_embeddings=512)
    hf_colbert.export(colbert, tmp_path)
    layouts = [layout for layout in ("colbert", "pylate") if (tmp_path / layout).exists()]
    source = str(tmp_path / layouts[0])
    raw = base_config(tmp_path) | {"train": TRAINING, "mesh": {}, "index": {"encode_batch": 8, "oracle_queries": 2}}
    raw["generator"] |= {"source": str(base), "tokenizer": str(base), "llama": {"max_positions": 512}}
    head = [] if family == "gemma3" else ["lm_head"]  # Gemma's is the embedding
    raw["generator"] |= {"lora": {"rank": 2, "alpha": 4, "targets": ["q", "v", "down", *head]}}
    raw["retriever"] |= {"source": source, "tokenizer": source, "augment_queries": published.augment_queries}
    raw["retriever"] |= {"query_marker": published.query_marker, "passage_marker": published.passage_marker}
    raw["retriever"]["bert"] = {"max_positions": 48}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    for command in ("prepare", "train", "index"):
        assert cli.main([command, "--config", str(tmp_path / "run.yaml")]) == 0
    assert cli.main(["export", raw["run_dir"], str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(["README.md", "adapters", "generator", *layouts])

    assert "Kind `exact`, 8 passages, token vectors of width 12." in (out / "README.md").read_text()

    run = Run.open(Config.model_validate(raw))
    start = run.initial_weights()
    abstract = run.abstract(("retriever", "generator"))
    end = {part: load_weights(run.directory / "arms" / "jmlr" / "weights" / part, abstract[part]) for part in abstract}
    for part in ("retriever", "generator"):
        changes = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), start[part], end[part])
        assert max(jax.tree.leaves(changes)) > 0.01, part

    cfg, tok = run.cfg.generator, transformers.AutoTokenizer.from_pretrained(out / "generator")
    prompts = []
    for i in range(20):
        passage, question = PASSAGES[i % 8], QUESTIONS[i % 6]
        text = cfg.passage_template.format(**passage)
        text += cfg.question_template.format(question=question["question"], options=f"A) drug {i}")
        prompts.append([run.prepared.generator_ids.bos, *tok(text, add_special_tokens=False)["input_ids"]])
    length = np.array([len(prompt) for prompt in prompts])
    table = np.zeros((20, length.max()), np.int32)
    for row, prompt in enumerate(prompts):
        table[row, : len(prompt)] = prompt
    adapters = bind(end["generator"], cfg.lora)
    asked = {"max_new": cfg.answer_length, "eos_id": run.prepared.generator_ids.eos, "adapters": adapters}
    tokens, made = generate(start["base"], run.llama, table, length, **asked)
    hidden = F.llama_hidden(start["base"], run.llama, table[:2], length[:2], adapters=adapters)
    ours = np.asarray(F.llama_logits(start["base"], run.llama, hidden, adapters=adapters))

    kind = transformers.AutoModelForCausalLM
    merged, plain = kind.from_pretrained(out / "generator"), kind.from_pretrained(base)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        answer = merged.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :]
        assert tokens[row, : made[row]].tolist() == answer.tolist()
    with torch.no_grad():
        before = [plain(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts[:2]]
        adapted = peft.PeftModel.from_pretrained(plain, out / "adapters")
        for model in (merged, adapted):
            for row, prompt in enumerate(prompts[:2]):
                theirs = model(torch.tensor([prompt])).logits[0].numpy()
                assert np.abs(theirs - before[row]).max() > 0.1
                np.testing.assert_allclose(ours[row, : len(prompt)], theirs, atol=1e-4)

    tokenizer = run.prepared.tokenizer_dir("retriever")
    scores = hf_colbert.encode(run.retriever, end["retriever"], tokenizer)["scores"]
    if "colbert" in layouts:
        np.testing.assert_allclose(scores, hf_colbert.colbert_ai(out / "colbert")[1].detach(), atol=1e-4)
    for layout in layouts:
        np.testing.assert_allclose(scores, hf_colbert.multi_vector(out / layout)["scores"], atol=1e-4)
    equal(load_retriever(str(out / "pylate"), run.cfg.retriever, jax.random.key(0))[1], end["retriever"])
