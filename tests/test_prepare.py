"""`prepare`: what it writes, what it refuses, and that it does nothing twice or by halves."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from test_batches import PASSAGES, QUESTIONS, small_config

from jmlr_jax.config import Config, DataConfig
from jmlr_jax.config_models import GeneratorConfig, LlamaConfig, RetrieverConfig
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.prepare import prepare
from jmlr_jax.data.prepare_report import random_hit
from jmlr_jax.data.schema import RecordError


def test_rows_of_records_tokens_and_gold_agree(tmp_path):
    card = prepare(small_config(tmp_path), tmp_path / "data")
    data = Prepared.open(tmp_path / "data")
    assert data.card == card and card["questions"] == {"train": 4, "dev": 0, "test": 2} and card["passages"] == 7
    assert [q.id for q in data.questions("train")] == ["q0", "q1", "q2", "q3"] and len(data.questions("dev")) == 0
    assert [p.id for p in data.passages] == [p["id"] for p in PASSAGES]
    for row, question in enumerate(data.questions("train")):
        assert [data.passages[int(i)].id for i in data.gold("train", row)] == list(question.gold_doc_ids)
    assert card["baselines"]["test"]["random@5"] == pytest.approx(5 / 7)
    assert card["baselines"]["test"]["bm25@5"] == 1.0


def test_fingerprints_tell_what_changed(tmp_path):
    cfg = small_config(tmp_path)
    first = prepare(cfg, tmp_path / "first")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("always", "often"))
    second = prepare(cfg, tmp_path / "second", keep=tmp_path / "first")
    before, after = first["fingerprints"], second["fingerprints"]
    assert {name for name in before if before[name] != after[name]} == {"corpus", "passages"}
    longer = cfg.model_copy(update={"retriever": cfg.retriever.model_copy(update={"query_length": 4})})
    again = prepare(longer, tmp_path / "third", keep=tmp_path / "first")["fingerprints"]
    assert {name for name in after if again[name] != after[name]} == {"train", "test"}, "queries are cut shorter"


def test_same_inputs_give_the_same_bytes(tmp_path):
    cfg = small_config(tmp_path)
    prepare(cfg, tmp_path / "a")
    prepare(cfg, tmp_path / "b")
    for path in sorted((tmp_path / "a" / "tokens").iterdir()) + [tmp_path / "a" / "prepare.json"]:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_split_documents_keep_their_gold(tmp_path):
    card = prepare(small_config(tmp_path, passage_words=4), tmp_path / "data")
    data = Prepared.open(tmp_path / "data")
    assert card["documents"] == 7 and card["passages"] == 14 and card["gold_ids_not_in_corpus"] == 0
    assert data.questions("test")[0].gold_doc_ids == ("p4#0", "p4#1") and data.gold("test", 0).tolist() == [8, 9]


def test_leaks_are_removed_and_reported(tmp_path):
    cfg = small_config(tmp_path, leakage_ngram=5)
    leak = {"id": "leak", "title": "", "text": "Asked: what treats condition zeta? Drug5!"}
    shown = {"id": "shown", "title": "", "text": "Asked: what treats condition alpha? Drug0!"}
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in (leak, shown))
    card = prepare(cfg, tmp_path / "data")
    (removed,) = card["leakage"]["removed_passages"]
    assert (removed["passage_id"], removed["question_id"]) == ("leak", "q5")
    assert removed["shared"] == "what treats condition zeta drug5" and not removed["gold"]
    assert card["leakage"]["train_overlap_examples"][0]["passage_id"] == "shown" and card["passages"] == 8


def test_bad_records_stop_or_are_listed(tmp_path):
    cfg = small_config(tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps(QUESTIONS[4] | {"id": "x", "answer": "?"}) + "\n")
    with pytest.raises(RecordError, match=r"train.jsonl:5: field 'answer'"):
        prepare(cfg, tmp_path / "data")
    card = prepare(small_config_again(cfg, on_error="skip"), tmp_path / "data")
    assert card["questions"]["train"] == 4 and "train.jsonl:5" in card["read"][0]["skipped"][0]


def small_config_again(cfg: Config, **data) -> Config:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update=data)})


def test_questions_that_do_not_fit_stop_or_are_listed(tmp_path):
    cfg = small_config(tmp_path)
    long = QUESTIONS[4] | {"id": "long", "options": ["a word " * 20, "rest"], "answer": "rest"}
    with open(tmp_path / "test.jsonl", "a") as file:
        file.write(json.dumps(long) + "\n")
    with pytest.raises(ValueError, match=r"test: .*question long.*Raise generator\.(answer|question)_length to \d+"):
        prepare(cfg, tmp_path / "data")
    card = prepare(small_config_again(cfg, on_error="skip"), tmp_path / "data")
    assert card["questions"]["test"] == 2 and all("question long" in line for line in card["dropped"])
    assert [q.id for q in Prepared.open(tmp_path / "data").questions("test")] == ["q4", "q5"]


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ({"train_path": "nowhere.jsonl"}, FileNotFoundError, "data.train_path=nowhere.jsonl"),
        ({"corpus_path": None}, ValueError, "set data.corpus_path"),
        ({"train_path": None, "test_path": None}, ValueError, "no questions: set data.train_path"),
    ],
)
def test_incomplete_configurations(tmp_path, data, error, match):
    with pytest.raises(error, match=match):
        prepare(small_config(tmp_path, **data), tmp_path / "data")


def test_ids_in_two_splits(tmp_path):
    cfg = small_config(tmp_path)
    (tmp_path / "test.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    with pytest.raises(ValueError, match=r"test.jsonl:1: the question id 'q0' stands in .*train.jsonl:1 already"):
        prepare(cfg, tmp_path / "data")


def test_a_vocabulary_below_the_tokenizers(tmp_path):
    cfg = small_config(tmp_path)
    generator = cfg.generator.model_copy(update={"llama": LlamaConfig(vocab_size=100)})
    with pytest.raises(ValueError, match=r"generator\.llama\.vocab_size=100 is below the tokenizer's \d+"):
        prepare(cfg.model_copy(update={"generator": generator}), tmp_path / "data")


def test_given_tokenizers_are_copied(tmp_path):
    cfg = small_config(tmp_path)
    prepare(cfg, tmp_path / "one")
    again = cfg.model_copy(
        update={
            name: getattr(cfg, name).model_copy(update={"tokenizer": str(tmp_path / "one" / "tokenizers" / name)})
            for name in ("retriever", "generator")
        }
    )
    card = prepare(again, tmp_path / "two")
    for path in (tmp_path / "one" / "tokens").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "tokens" / path.name).read_bytes()
    assert card["generator_ids"] == Prepared.open(tmp_path / "one").card["generator_ids"]


def test_tiny_pubmedqa_file_with_its_own_contexts(tmp_path, shared_data):
    path = str(shared_data / "raw_formats/pubmedqa/ori_pqal_first20.json")
    lengths = GeneratorConfig(question_length=96, passage_length=96, answer_length=8)
    cfg = Config(data=DataConfig(questions="pubmedqa", test_path=path), generator=lengths)
    card = prepare(cfg, tmp_path / "data", Console(quiet=True))
    assert card["questions"]["test"] == 20 and card["passages"] > 40 and card["max_options"] == 3
    assert card["baselines"]["test"]["bm25@1"] > 0.9 and card["baselines"]["test"]["chance"] == pytest.approx(1 / 3)


def test_tiny_medquad_prints_its_statistics(tmp_path, shared_data):
    tiny = shared_data / "tiny"
    data = DataConfig(
        questions="jsonl",
        train_path=str(tiny / "medquad_mcq/train.jsonl"),
        test_path=str(tiny / "medquad_mcq/test.jsonl"),
        corpus_path=str(tiny / "medquad/corpus.jsonl"),
    )
    lengths = GeneratorConfig(question_length=128, answer_length=48)
    console = Console(record=True, width=120, file=io.StringIO())
    card = prepare(Config(data=data, generator=lengths), tmp_path / "data", console)
    # statement questions quote their passages, so the filter hits gold passages: removed, but not silently
    leakage = card["leakage"]
    assert leakage["gold_removed"] == leakage["removed"] > 0 and leakage["train_overlaps"] > 0
    printed = console.export_text()
    assert f"{leakage['removed']:,} of 1,300 passages" in printed
    assert card["cuts"]["references"]["cut"] > 0 and f"{card['cuts']['references']['cut']:,}" in printed
    off = prepare(Config(data=data.model_copy(update={"leakage_ngram": 0}), generator=lengths), tmp_path / "off")
    assert off["passages"] == 1300 and off["leakage"]["removed"] == 0


def test_random_hit_is_the_exact_share():
    sets = [{a, b, c} for a in range(6) for b in range(a) for c in range(b)]
    share = np.mean([bool(drawn & {0, 1}) for drawn in sets])
    assert len(sets) == math.comb(6, 3) and random_hit(6, 2, 3) == pytest.approx(share)


def test_retriever_marker_must_be_a_token(tmp_path):
    cfg = small_config(tmp_path)
    prepare(cfg, tmp_path / "one")
    section = RetrieverConfig(tokenizer=str(tmp_path / "one" / "tokenizers" / "retriever"), query_marker="[unused0]")
    with pytest.raises(ValueError, match=r"retriever\.query_marker='\[unused0\]'"):
        prepare(cfg.model_copy(update={"retriever": section}), tmp_path / "two")
