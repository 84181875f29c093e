"""The model card says what the run recorded, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from jmlr_jax.config import Config
from jmlr_jax.config_models import BertConfig, GeneratorConfig, LlamaConfig, RetrieverConfig
from jmlr_jax.hf.card import copy_legal_files, licence, model_card

PREPARE = {
    "questions": {"train": 90, "dev": 5, "test": 31},
    "passages": 777,
    "fingerprints": {"corpus": "c0ffee" * 8},
    "leakage": {"ngram": 12, "removed": 3},
    "read": [{"file": "train.jsonl", "read": 95}],
}
ROW = {"n": 31, "accuracy": 0.6129, "low": 0.45, "high": 0.77, "unparsed": 2}
ROW |= {"generation_accuracy": 0.5806, "generation_low": 0.4, "generation_high": None}
INDEX = {"kind": "scann", "passages": 777, "dim": 64}
INDEX |= {"ann_recall": {"10": 0.987}, "oracle_queries": 200}


def card(cfg: Config, **changes: Any) -> str:
    given: dict[str, Any] = {"prepare": PREPARE, "results": {"jmlr": ROW}, "chance": 0.25, "index": INDEX}
    given |= {"folders": {"generator": ("language model", "transformers")}} | changes
    return model_card(
        cfg, "jmlr", LlamaConfig(vocab_size=300), RetrieverConfig(bert=BertConfig(vocab_size=99)), **given
    )


def test_everything_recorded_is_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n# Base\n")
    (tmp_path / "LICENSE.txt").write_text("terms")
    cfg = Config(run_dir="runs/a", generator=GeneratorConfig(source=str(tmp_path)))
    text = card(cfg)
    header, body = text.split("---\n")[1:3]
    assert yaml.safe_load(header)["license"] == "llama2" and yaml.safe_load(header)["base_model"] == [str(tmp_path)]
    for part in (
        "| jmlr | 31 | 61.3% | 45.0% to 77.0% | 58.1% | 40.0% to - | 2 |",
        "Guessing: 25.0%",
        "train 90, dev 5, test 31",
        "Passages: 777; corpus fingerprint `c0ffeec0ffeec0ff`",
        "3 passages that share 12 words",
        "train.jsonl: 95 records",
        "Kind `scann`, 777 passages, token vectors of width 64. ANN recall (agreement with exact search)",
        "98.7% at 10",
        "no medical device",
        "generator: licence of its base model: llama2",
        "retriever: trained from random weights",
        "# a: a retriever",
    ):
        assert part in body, part
    assert f"`{json.dumps(cfg.generator.question_template)}`" in body
    copy_legal_files(str(tmp_path), epath.Path(tmp_path / "out").mkdir() or epath.Path(tmp_path / "out"))
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_what_is_missing_is_said_to_be(tmp_path: Path) -> None:
    cfg = Config(run_dir="runs/a", retriever=RetrieverConfig(source=str(tmp_path)))
    text = card(cfg, prepare={}, results={}, chance=None, index=None)
    for part in ("was not evaluated before", "No index was kept", "not stated in its directory"):
        assert part in text, part
    assert "license:" not in text and "None" not in text and "Passages:" not in text


def test_licences(tmp_path: Path) -> None:
    assert licence(str(tmp_path)) is None
    for header, expected in (
        ("license: other\nlicense_name: llama3.1", "llama3.1"),
        ("license: apache-2.0", "apache-2.0"),
        ("tags: [x]", None),
        ("license: [unclosed", None),
    ):
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\ntext\n")
        assert licence(str(tmp_path)) == expected
    (tmp_path / "README.md").write_text("no header")
    assert licence(str(tmp_path)) is None
