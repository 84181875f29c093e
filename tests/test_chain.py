"""Commands one after the other, as a user types them: what was made is used, made again, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import one_device

from jmlr_jax.cli import main
from jmlr_jax.commands.pipeline import prepare_data
from jmlr_jax.config_io import load

CONDITIONS = [f"{a}{b}" for a in ("vel", "tam", "kor", "bin", "sul") for b in ("aric", "osis", "emia", "itis")]
DRUGS = ["aspirin", "colchicine", "insulin", "warfarin"]
SMALL = """\
data: {questions: jsonl, train_path: train.jsonl, dev_path: dev.jsonl, test_path: test.jsonl, corpus_path: corpus.jsonl}
retriever: {tokenizer_vocab: 300, query_length: 16, passage_length: 24, dim: 8,
  bert: {hidden_size: 16, intermediate_size: 16, num_heads: 1}}
generator: {tokenizer_vocab: 400, question_length: 80, passage_length: 40, answer_length: 12,
  llama: {hidden_size: 16, intermediate_size: 16, num_layers: 1, num_heads: 1, num_kv_heads: 1}}
index: {oracle_queries: 4, encode_batch: 16}
train: {steps: 2, batch_size: 4, candidates: 4, mix: {index: 2, bm25: 1, random: 1}, sampled: 3, read_passages: 2,
  refresh_steps: 0, checkpoint_steps: 2, log_steps: 1, dev_questions: 0, warmup: {steps: 0}}
eval: {max_questions: 4, bootstrap: 20, batch_size: 4, arms: [jmlr, bm25], hit_at: [1, 2]}
"""


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Questions, passages and a configuration, as a user has them."""
    folder = tmp_path_factory.mktemp("inputs")
    passages = [
        {"id": f"p{i}", "title": name, "text": f"{name} is treated with {DRUGS[i % 4]} in most adults."}
        for i, name in enumerate(CONDITIONS)
    ]
    questions = [
        {
            "id": f"q{i}",
            "question": f"What is {name} treated with?",
            "options": dict(zip("ABCD", DRUGS, strict=True)),
            "answer": "ABCD"[i % 4],
            "gold_doc_ids": [f"p{i}"],
        }
        for i, name in enumerate(CONDITIONS)
    ]
    (folder / "corpus.jsonl").write_text(lines(passages))
    for split, part in (("train", questions[:12]), ("dev", questions[12:16]), ("test", questions[16:])):
        (folder / f"{split}.jsonl").write_text(lines(part))
    (folder / "small.yaml").write_text(SMALL)
    return folder


@pytest.fixture
def here(inputs, tmp_path, monkeypatch) -> Path:
    """A working directory with the inputs, on one device."""
    one_device(monkeypatch)
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """A directory where two arms were trained and evaluated on test; copy it before changing it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        folder = tmp_path_factory.mktemp("finished")
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        monkeypatch.chdir(folder)
        jmlr("prepare --config small.yaml --run-dir out")
        jmlr("index --run-dir out")
        jmlr("train --run-dir out --arm all")
        jmlr("eval --run-dir out")
    return folder


@pytest.fixture
def trained(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that directory, as working directory: it has been moved, as a user moves it."""
    one_device(monkeypatch)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jmlr(line: str, *more: str) -> None:
    """A command that must succeed."""
    assert main([*line.split(), *more]) == 0, line


def refused(capsys, line: str, *more: str) -> str:
    """What a command says that must be refused."""
    capsys.readouterr()
    assert main([*line.split(), *more]) == 2, line
    said = capsys.readouterr().err
    assert "jmlr: " in said and "Traceback" not in said
    return said


def card(run: Path = Path("out")) -> dict:
    return json.loads((run / "data" / "prepare.json").read_text())


def index_card(name: str = "initial") -> dict:
    return json.loads((Path("out/index") / name / "card.json").read_text())


def evaluated(split: str, arm: str) -> dict:
    return json.loads((Path("out/eval") / split / arm / "summary.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Prepared, then used.


def test_a_prepared_run_brings_its_configuration(here, capsys):
    jmlr("prepare --config small.yaml --run-dir out")
    jmlr("index --run-dir out")
    assert card()["lengths"]["query"] == 16 and index_card()["passages"] == len(CONDITIONS)
    said = refused(capsys, "index --run-dir out retriever.query_length=13")
    assert "retriever.query_length was 16, now 13" in said and "jmlr prepare" in said


def test_a_run_is_used_from_another_directory_and_without_its_inputs(trained, tmp_path_factory, monkeypatch):
    run = trained / "out"
    (trained / "corpus.jsonl").unlink()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    jmlr(f"search aspirin --run-dir {run} --k 1")


def test_an_input_named_anew_is_not_passed_over(trained, capsys):
    """Evaluating other questions without preparing them would evaluate the old ones."""
    Path("other.jsonl").write_text(Path("test.jsonl").read_text().replace("treated", "cured"))
    said = refused(capsys, "eval --run-dir out data.test_path=other.jsonl")
    assert "data.test_path (" in said and "other.jsonl) has changed" in said


def test_another_length_makes_the_index_again(here):
    jmlr("prepare --config small.yaml --run-dir out")
    jmlr("index --run-dir out")
    before = index_card()["corpus_fingerprint"]
    jmlr("prepare --config small.yaml --run-dir out retriever.passage_length=9")
    jmlr("index --run-dir out")
    assert index_card()["corpus_fingerprint"] != before


@pytest.mark.parametrize(
    "override",
    ["retriever.passage_length=9", "generator.passage_template= {text}", "retriever.tokenizer_vocab=200"],
)
def test_trained_arms_keep_lengths_templates_and_tokenizers(trained, capsys, override):
    before = files(Path("out"))
    said = refused(capsys, "prepare --run-dir out", override)
    assert override.split("=")[0] in said and "arms were trained on these data (bm25, jmlr)" in said
    assert files(Path("out")) == before


def test_a_changing_corpus_leaves_the_tokenizers_of_trained_arms(trained):
    before, was = card()["fingerprints"], evaluated("test", "jmlr")
    with open("corpus.jsonl", "a") as corpus:
        corpus.write(lines([{"id": "new", "title": "zymoxis", "text": "zymoxis quite needs quinquereme xylophones."}]))
    jmlr("prepare --run-dir out data.corpus_path=corpus.jsonl")
    after = card()["fingerprints"]
    assert [k for k in before if before[k] != after[k]] == ["corpus", "passages"]
    jmlr("index --run-dir out")
    assert index_card("jmlr")["updates"] == 1 and index_card("jmlr")["passages"] == len(CONDITIONS) + 1
    jmlr("eval --run-dir out")
    assert evaluated("test", "jmlr")["nll"]["without_passages"] == pytest.approx(was["nll"]["without_passages"])


def test_trained_arms_of_another_corpus_are_not_taken_for_finished(trained, capsys):
    with open("corpus.jsonl", "a") as corpus:
        corpus.write(lines([{"id": "new", "title": "zymoxis", "text": "nothing helps"}]))
    jmlr("prepare --run-dir out data.corpus_path=corpus.jsonl")
    assert "passages has changed" in refused(capsys, "train --run-dir out")


def test_another_training_is_refused_by_its_keys_and_how_it_is_watched_is_not(trained, capsys):
    said = refused(capsys, "train --run-dir out train.sampled=2 train.rank_weight=0.5")
    assert "train.sampled was 3, now 2" in said and "train.rank_weight was 1.0, now 0.5" in said
    jmlr("train --run-dir out train.log_steps=2 train.keep_last=1 eval.max_questions=2")


def test_one_corpus_is_prepared_once_for_all_seeds(here):
    cfg = load("small.yaml")
    first, second = (cfg.model_copy(update={"run_dir": f"out/seed_{seed}", "seed": seed}) for seed in (0, 1))
    prepare_data(first)
    made = Path("out/seed_0/data").absolute()
    prepare_data(second, like=made)
    assert files(Path("out/seed_1/data")) == files(made)
    assert all(
        (Path("out/seed_1/data") / name).samefile(made / name) for name in files(made) if "made_from" not in name
    )
    # Of other lengths it is made on its own.
    other = cfg.retriever.model_copy(update={"query_length": 12})
    prepare_data(second.model_copy(update={"retriever": other, "run_dir": "out/seed_2"}), like=made)
    assert card(Path("out/seed_2"))["lengths"]["query"] == 12


# Sources.


def test_a_published_model_brings_its_tokenizer(here, capsys):
    jmlr("prepare --config small.yaml --run-dir out")
    jmlr("train --run-dir out --arm bm25")
    jmlr("export out exported --arm bm25")
    source = "generator.source=exported/generator"
    assert "generator: tokenizer=train" in refused(
        capsys, "prepare --config small.yaml --run-dir two", source, "generator.tokenizer=train"
    )
    jmlr("prepare --config small.yaml --run-dir two", source)
    assert card(Path("two"))["generator_ids"] == card()["generator_ids"]
    # Another one, of other ids.
    jmlr("prepare --config small.yaml --run-dir three generator.tokenizer_vocab=300")
    other = "generator.tokenizer=three/data/tokenizers/generator"
    assert "not the tokenizer of generator.source" in refused(
        capsys, "prepare --config small.yaml --run-dir four", source, other
    )
    assert not Path("four").exists()


# Evaluation.


def test_splits_are_kept_apart_and_an_override_is_for_once(trained):
    before = files(Path("out/eval/test"))
    jmlr("eval --run-dir out eval.split=dev eval.arms=[jmlr]")
    assert files(Path("out/eval/test")) == before and evaluated("dev", "jmlr")["split"] == "dev"
    assert not Path("out/eval/dev/bm25").exists()
    shutil.rmtree("out/eval/test/bm25")
    jmlr("eval --run-dir out")
    assert evaluated("test", "bm25")["split"] == "test"
    jmlr("report --run-dir out")
    report = json.loads(Path("out/report.json").read_text())
    assert set(report["arms"]) == {"jmlr", "bm25"} and report["split"] == "test"
    jmlr("report --run-dir out eval.split=dev")
    assert set(json.loads(Path("out/report.json").read_text())["arms"]) == {"jmlr"}


def test_the_report_refuses_to_mix(trained, capsys):
    jmlr("eval --run-dir out --arm jmlr eval.max_questions=2")
    said = refused(capsys, "report --run-dir out")
    assert "eval.max_questions was" in said and "jmlr eval" in said
    jmlr("eval --run-dir out")
    jmlr("report --run-dir out")
    shutil.rmtree("out/arms/bm25")
    jmlr("train --run-dir out --arm bm25 train.steps=1")
    assert "of other weights than arms/bm25 has now" in refused(capsys, "report --run-dir out")


def test_what_is_evaluated_is_not_evaluated_again(trained):
    places = [Path("out/eval/test") / arm / "summary.json" for arm in ("jmlr", "bm25", "initial")]
    before = [place.stat().st_mtime_ns for place in places]
    jmlr("eval --run-dir out")
    assert [place.stat().st_mtime_ns for place in places] == before


# Indexes.


def test_another_recall_tunes_the_index_again(here):
    jmlr("prepare --config small.yaml --run-dir out index.kind=scann")
    jmlr("index --run-dir out --recall 0.5")
    assert index_card()["ann_recall_target"] == 0.5
    jmlr("index --run-dir out --recall 0.99")
    assert index_card()["ann_recall_target"] == 0.99
    jmlr("index --run-dir out")  # the override was for once
    assert index_card()["ann_recall_target"] == 0.95


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_index_needs_no_training_questions(here, kind):
    none = "data.train_path=null data.dev_path=null"
    jmlr(f"prepare --config small.yaml --run-dir out {none} index.kind={kind}")
    jmlr("index --run-dir out")
    jmlr("search aspirin --run-dir out --k 1")


def test_a_refused_first_command_leaves_nothing_behind(here, capsys):
    assert "train.jsonl" in refused(capsys, "prepare --config small.yaml --run-dir out data.train_path=no/train.jsonl")
    assert not Path("out").exists()
    jmlr("prepare --config small.yaml --run-dir out")
    before = files(Path("out"))
    refused(capsys, "index --run-dir out mesh.fsdp=64")
    refused(capsys, "train --run-dir out mesh.fsdp=64")
    assert files(Path("out")) == before
    jmlr("index --run-dir out")


def test_brackets_in_a_path(here, capsys):
    """The checkpoint library takes them for a pattern; what needs no weights works, and training says so first."""
    jmlr("prepare --config small.yaml --run-dir", "x [v2]")
    jmlr("index --run-dir", "x [v2]")
    assert "x [v2]: Orbax reads [ ] * ?" in refused(capsys, "train --run-dir", "x [v2]")
    assert not Path("x [v2]/arms").exists()


# Tables of a phase that does not refresh.


def test_a_resumed_phase_reads_the_table_it_began_with(here, capsys):
    """Whatever an index would find the second time; another table is not taken for it."""
    jmlr("prepare --config small.yaml --run-dir out index.kind=scann train.steps=6 train.keep_last=3")
    jmlr("train --run-dir out --arm frozen")
    kept = Path("out/arms/frozen/tables/fixed.npz")
    began = kept.read_bytes()
    with np.load(kept) as found:
        swapped = {name: table[:, ::-1] if table.ndim == 2 else table for name, table in found.items()}
    whole = Path("out/arms/frozen/metrics.jsonl").read_text()
    shutil.rmtree("out/arms/frozen/weights")
    for step in ("4", "6"):
        shutil.rmtree(Path("out/arms/frozen/checkpoints") / step)
    np.savez(kept, **swapped)
    assert "tables: not the tables that the phase began with" in refused(capsys, "train --run-dir out --arm frozen")
    kept.write_bytes(began)
    jmlr("train --run-dir out --arm frozen")
    assert Path("out/arms/frozen/metrics.jsonl").read_text() == whole and kept.read_bytes() == began
