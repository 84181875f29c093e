"""Published question sets: their readers, and how a trained run answers them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import suites
from answering import SETTINGS, rows_of
from runs import open_run, tiny_config

from jmlr_jax import cli
from jmlr_jax.answering.retrieval import run_searcher
from jmlr_jax.config import SuiteName
from jmlr_jax.data.batches import Prepared
from jmlr_jax.data.readers import read_questions
from jmlr_jax.data.schema import InputError, RecordError
from jmlr_jax.data.suites import SUITES, question_only, read_suite, write_suite
from jmlr_jax.data.token_table import TokenTable
from jmlr_jax.evaluation.arms import reader_of
from jmlr_jax.evaluation.intervals import Sample, strata_interval
from jmlr_jax.evaluation.suites import evaluate_suite

# ---------------------------------------------------------------- readers


def test_medxpertqa(tmp_path):
    path = suites.write_lines(tmp_path / "test.jsonl", suites.MEDXPERTQA)
    (question,) = read_questions("medxpertqa", path).questions
    assert question.question == "A boy coughs.\nWhich is best?", "its options are a field of their own"
    assert (question.id, question.answer, question.kind) == ("Text-7", "drug J", "Reasoning")
    assert question.options == tuple(suites.LETTERED.values())


def test_mmlu_pro_is_read_for_health_and_biology(tmp_path):
    other = suites.MMLU_PRO | {"question_id": 71, "category": "law"}
    short = suites.MMLU_PRO | {"category": "biology", "options": ["a", "b", "c"], "answer": "B", "answer_index": 1}
    result = read_questions("mmlu_pro", suites.write_lines(tmp_path / "test.jsonl", suites.MMLU_PRO, other, short))
    health, biology = result.questions
    assert (health.id, health.answer, len(health.options)) == ("health-70", "drug I", 10)
    assert (biology.id, biology.kind, biology.answer) == ("biology-70", "biology", "b")
    assert (result.report.read, result.report.outside) == (2, 1)


def test_medqa_with_five_options(tmp_path):
    (question,) = read_questions("medqa", suites.write_lines(tmp_path / "test.jsonl", suites.MEDQA_5)).questions
    assert (len(question.options), question.answer, question.letter) == (5, "drug E", "E")


def test_bioasq_yes_no_questions_with_their_snippets(tmp_path, shared_data):
    result = read_questions("bioasq", suites.write_json(tmp_path / "golden.json", suites.BIOASQ))
    yes, no = result.questions
    assert (yes.options, yes.answer, no.answer) == (("yes", "no"), "yes", "no")
    assert result.report.outside == 1
    assert [(p.id, p.text) for p in result.passages] == [
        ("b1-0", "Zol lowers it."),
        ("b1-1", "Amine does not."),
        ("b2-0", "Amine does not."),
    ]
    assert yes.gold_doc_ids == ("b1-0", "b1-1") and result.passages[0].url.endswith("pubmed/0")
    published = read_questions("bioasq", str(shared_data / "raw_formats/bioasq/golden_yesno_first20_trimmed.json"))
    theirs = json.loads((shared_data / "raw_formats/mirage/benchmark_first20.json").read_text())["bioasq"]
    assert len(published.questions) == 20
    for question in published.questions:
        assert {"A": "yes", "B": "no"}[theirs[question.id]["answer"]] == question.answer


@pytest.mark.parametrize(
    ("form", "record", "field", "expected"),
    [
        ("medxpertqa", suites.MEDXPERTQA | {"images": ["a.png"]}, "images", "Text set"),
        ("medxpertqa", suites.MEDXPERTQA | {"label": "K"}, "label", "A to J"),
        ("mmlu_pro", suites.MMLU_PRO | {"answer_index": 7}, "answer_index", "8, the place of answer I"),
        ("mmlu_pro", suites.MMLU_PRO | {"question_id": None}, "question_id", "a number"),
        ("bioasq", suites.BIOASQ["questions"][1] | {"exact_answer": "maybe"}, "exact_answer", "yes or no"),
        ("bioasq", {"id": "b9", "body": "q?", "exact_answer": "yes"}, "type", "non-empty"),
        ("bioasq", suites.BIOASQ["questions"][1] | {"snippets": [{"document": "d"}]}, "text", "non-empty"),
        ("bioasq", suites.BIOASQ["questions"][1] | {"body": "a\0b"}, "questions.body", "NUL"),
    ],
)
def test_bad_records_are_named(tmp_path, form, record, field, expected):
    """By file, the line where the record begins, and field."""
    first = suites.BIOASQ["questions"][2]
    if form == "bioasq":
        path = tmp_path / "set.json"
        path.write_text('{"about": {"questions": [1, 2]},\n "questions": [\n' + f"{json.dumps(first)},\n\n")
        path.write_text(path.read_text() + f"{json.dumps(record)}]}}")
        line = 5
    else:
        good = {"medxpertqa": suites.MEDXPERTQA, "mmlu_pro": suites.MMLU_PRO}[form]
        path, line = Path(suites.write_lines(tmp_path / "set.jsonl", good, record)), 2
    with pytest.raises(RecordError, match=expected) as error:
        read_questions(form, str(path))
    assert (error.value.file, error.value.line, error.value.field) == (str(path), line, field)
    assert len(read_questions(form, str(path), "skip").questions) == 1


@pytest.mark.parametrize("content", ["[1]", '{"questions": {"a": 1}}', "{}"])
def test_a_golden_file_without_its_list(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecordError, match=r"a.json:1: field 'questions': expected a list"):
        read_questions("bioasq", str(tmp_path / "a.json"), "skip")


# ---------------------------------------------------------------- a run answers MIRAGE


@pytest.fixture(scope="module")
def folder(askable, tmp_path_factory):
    """A run that can be asked, of which more may be written."""
    return Path(shutil.copytree(askable, tmp_path_factory.mktemp("suites") / "run"))


def asked(folder: Path, suite: str, path: str, arms: Any = ("jmlr",), **more: Any) -> dict[str, dict[str, Any]]:
    """Summaries by arm."""
    settings = {**SETTINGS, "eval": {**SETTINGS["eval"], "max_questions": 0, **more}}
    evaluate_suite(open_run(folder / "data", folder, **settings), suite, path, arms)
    return {arm: json.loads((folder / "eval" / suite / arm / "summary.json").read_text()) for arm in arms}


def lines_of(folder: Path, suite: str, arm: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "eval" / suite / arm / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Five tasks; one question does not fit."""
    content = suites.mirage()
    content["medqa"]["0002"]["options"]["C"] = "a very long option " * 20
    return suites.write_json(tmp_path_factory.mktemp("mirage") / "benchmark.json", content)


@pytest.fixture(scope="module")
def found(folder, benchmark, patch):
    return asked(folder, "mirage", benchmark, ("jmlr", "bm25", "closed_book"))


def test_accuracies_of_tasks_and_their_mean(folder, found):
    for arm, summary in found.items():
        lines = lines_of(folder, "mirage", arm)
        assert len(lines) == sum(suites.COUNTS.values()) == 19
        for task, count in suites.COUNTS.items():
            some = [line for line in lines if line["task"] == task]
            assert summary["tasks"][task]["n"] == len(some) == count
            for key, figure in (("correct", summary["tasks"][task]), ("generated_correct", None)):
                figure = figure or summary["tasks"][task]["written"]
                assert figure["accuracy"] == pytest.approx(sum(line[key] for line in some) / count)
                assert figure["low"] <= figure["accuracy"] <= figure["high"]
        accuracies = [summary["tasks"][task]["accuracy"] for task in suites.COUNTS]
        assert summary["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 5)  # not of all questions together
        assert list(summary["tasks"]) == ["mmlu", "medqa", "medmcqa", "pubmedqa", "bioasq"]
        assert summary["tasks"]["pubmedqa"]["chance"] == pytest.approx(1 / 3)


def test_unread_answers_are_wrong_and_so_is_what_does_not_fit(folder, found):
    lines = lines_of(folder, "mirage", "jmlr")
    unread = [line for line in lines if line["parsed"] is None]
    assert unread and not any(line["generated_correct"] for line in unread)
    assert any(line.get("answer") == 0 for line in unread), "A is right in one of them, and no fallback"
    (left,) = [line for line in lines if "misfit" in line]
    assert (left["id"], left["correct"]) == ("medqa/0002", False) and "generator.question_length is 80" in left[
        "misfit"
    ]
    assert found["jmlr"]["tasks"]["medqa"]["misfits"] == 1
    assert any("1 questions do not fit" in line and "medqa/0002" in line for line in found["jmlr"]["deviations"])


def test_32_passages_are_found_by_the_question_alone_and_read_as_far_as_they_fit(folder, found):
    run = open_run(folder / "data", folder, **SETTINGS)
    for line in lines_of(folder, "mirage", "bm25"):
        if "misfit" not in line:
            rows = run.lexical.search([line["question"]], 32)[0][0]
            assert line["passages"] == [run.prepared.passages[int(row)].id for row in rows if row >= 0]
    searcher = run_searcher(run, "jmlr")
    some = [line for line in lines_of(folder, "mirage", "jmlr") if "misfit" not in line]
    rows, _ = searcher.search([line["question"] for line in some], 32)
    for line, row_K in zip(some, rows, strict=True):
        assert line["passages"] == [run.prepared.passages[int(row)].id for row in row_K]
        kept = len(line["passages"]) - line["dropped"]
        assert 3 <= kept < 32
    jmlr = found["jmlr"]["tasks"]["mmlu"]
    assert jmlr["retrieved"] == 32 and 3 <= jmlr["read"] < 32
    said = "\n".join(found["jmlr"]["deviations"])
    assert "passages are read on average, not 32" in said and "generator.max_length=512; in training it read 3" in said
    assert found["closed_book"]["tasks"]["mmlu"]["read"] == 0
    assert "no passages are read: the arm is closed book" in found["closed_book"]["deviations"]


@pytest.mark.parametrize("template", ["{question} {options}", "{options}"])
def test_options_are_no_part_of_a_query(tiny_data, benchmark, tmp_path, template):
    prepared = Prepared.open(tiny_data)
    cfg = tiny_config(tmp_path, retriever={"query_template": template})
    assert question_only(cfg) == "{question}"
    for name, given in (("with", cfg), ("without", tiny_config(tmp_path))):
        write_suite(given, prepared, SUITES["mirage"], benchmark, tmp_path / name)
    tables = [TokenTable.open(tmp_path / name / "tokens", "mirage.queries") for name in ("with", "without")]
    np.testing.assert_array_equal(tables[0].ids, tables[1].ids)
    assert (tmp_path / "with" / "questions").is_dir() and len(tables[0]) == 18


def test_what_deviates_is_said(folder, found):
    said = "\n".join(found["jmlr"]["deviations"])
    assert "mmlu: the file has 4 questions, 1,089 were published" in said
    for word in ("step-by-step", "takes A", "MedCorp", "mean log-likelihood", "templates", "no examples stand in"):
        assert word in said, word
    count = len(open_run(folder / "data", folder, **SETTINGS).prepared.questions("train"))
    assert f"trained on {count:,} questions of the run, 0 of those asked" in said
    assert found["jmlr"]["others"]["PMC-LLaMA-13B with MedRAG"] == 52.92


def test_the_same_again_is_left_alone_and_another_file_is_not(folder, benchmark, found, tmp_path, capsys):
    summary = folder / "eval" / "mirage" / "bm25" / "summary.json"
    before = summary.stat().st_mtime_ns
    moved = shutil.copy(benchmark, tmp_path / "elsewhere.json")
    assert asked(folder, "mirage", str(moved), ("bm25",)) == {"bm25": found["bm25"]}
    assert summary.stat().st_mtime_ns == before and "evaluated already, from the same" in capsys.readouterr().err
    own = tmp_path / "run"
    shutil.copytree(folder, own)
    content = json.loads(Path(benchmark).read_text())
    content["mmlu"]["0000"]["answer"] = "B"
    asked(own, "mirage", suites.write_json(tmp_path / "other.json", content), ("bm25",), max_questions=2)
    said = capsys.readouterr().err
    assert "questions (" in said and "has changed" in said and "eval.max_questions was 0, now 2" in said
    lines = lines_of(own, "mirage", "bm25")
    assert len(lines) == 10 and dict.fromkeys(suites.COUNTS, 2) == Counter(line["task"] for line in lines)
    both = asked(own, "mirage", suites.write_json(tmp_path / "other.json", content), ("closed_book",), max_questions=2)
    assert [line["id"] for line in lines_of(own, "mirage", "closed_book")] == [line["id"] for line in lines]
    said = "; ".join(both["closed_book"]["deviations"])
    assert "medmcqa: 2 of the file's 4 questions, drawn (eval.max_questions); the file has 4" in said


def test_the_command_prints_tasks_mean_others_and_deviations(folder, benchmark, found, capsys):
    words = ["eval", "--run-dir", str(folder), "--suite", "mirage", "--questions", benchmark, "eval.max_questions=0"]
    assert cli.main([*words, "eval.arms=[jmlr,bm25,closed_book]"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    mean = found["jmlr"]["mean"]
    assert ["mean", "of", "5", f"{100 * mean['accuracy']:.2f}"] in [row[:4] for row in rows]
    assert "52.92  PMC-LLaMA-13B with MedRAG" in out and "of other models, corpora and prompts" in out
    assert out.count("MIRAGE's script takes A") == 1 and "  - closed book: no passages are read" in out
    assert next(row for row in rows if row[:1] == ["medmcqa"])[1:3] == ["4", "25.0"]
    assert "…" not in out and "MIRAGE: JMLR (joint)" in out


# ---------------------------------------------------------------- other suites


def test_questions_of_the_run_are_answered_as_its_own_evaluation_does(folder):
    """The run's test questions as a file of one's own: without passages each loss is what the test split has."""
    run = open_run(folder / "data", folder, **SETTINGS)
    train = run.prepared.questions("train")[0]
    records = [
        {"id": q.id, "question": q.question, "options": list(q.options), "answer": q.answer}
        for q in (*run.prepared.questions("test"), train)
    ]
    path = suites.write_lines(folder / "own.jsonl", *records)
    summary = asked(folder, "amboss", path, ("closed_book",))["closed_book"]
    lines = {line["id"]: line for line in lines_of(folder, "amboss", "closed_book")}
    known = rows_of(folder, "closed_book")
    assert len(lines) == len(records) > len(known) == 8
    for row in known:
        assert lines[row["id"]]["option_nll"] == pytest.approx(row["option_nll"], abs=1e-4)
        assert lines[row["id"]]["generated"] == row["generated"]
    assert summary["mean"] is None and summary["tasks"]["amboss"]["n"] == len(records)
    assert any("1 of those asked" in line for line in summary["deviations"])


@pytest.mark.parametrize(("suite", "given"), [("pubmedqa", "abstract"), ("bioasq", "snippets")])
def test_with_and_without_what_the_file_gives(folder, suite, given, tmp_path):
    path = suites.write_json(tmp_path / "set.json", {"pubmedqa": suites.PUBMEDQA, "bioasq": suites.BIOASQ}[suite])
    without = asked(folder, suite, path, ("bm25",))["bm25"]
    with_it = asked(folder, f"{suite}_{given}", path, ("bm25",))["bm25"]
    own = read_questions(suite, path)
    for line, question in zip(lines_of(folder, f"{suite}_{given}", "bm25"), own.questions, strict=True):
        assert line["passages"] == list(question.gold_doc_ids)[::-1] and line["dropped"] == 0  # read last to first
    ids = {passage.id for passage in own.passages}
    assert not ids & {p for line in lines_of(folder, suite, "bm25") for p in line["passages"]}
    assert any("nothing is retrieved" in line for line in with_it["deviations"])
    assert any("BM25 finds in the run's corpus" in line for line in without["deviations"])
    run = open_run(folder / "data", folder, **SETTINGS)
    prepared = run.prepared.with_suite("x", folder / "eval" / f"{suite}_{given}" / "data", 3, own_passages=True)
    decode = reader_of(run, run.initial_weights()["generator"]).decode
    text = decode(prepared.tokens("references").row(0))
    assert own.passages[0].text.lower() in text.lower()


@pytest.mark.parametrize(
    ("suite", "write", "expected"),
    [
        ("mmlu_pro", lambda p: suites.write_lines(p, suites.MMLU_PRO), "no questions of biology; give the whole file"),
        ("mmlu_pro", lambda p: suites.write_lines(p, suites.MMLU_PRO, {"category": "health"}), ":2: field 'question"),
        ("bioasq_snippets", lambda p: suites.write_json(p, {"questions": [BARE]}), "ask --suite bioasq instead"),
        ("amboss", lambda p: suites.write_lines(p, {"question": "q?", "answer": "free"}), ":1: question .* no options"),
        (
            "medqa",
            lambda p: suites.write_lines(p, LONG),
            "no question of medqa fits, the first: .*question_length is 80",
        ),
        ("medqa", str, "no such file; --questions names the file of MedQA"),
    ],
)
def test_a_file_that_is_not_the_suite_is_refused_and_nothing_is_left(
    askable, patch, tmp_path, capsys, suite, write, expected
):
    folder, path = Path(shutil.copytree(askable, tmp_path / "run")), write(tmp_path / "file.jsonl")
    words = ["eval", "--run-dir", str(folder), "--arm", "bm25", "--suite", suite, "--questions", path]
    before = sorted(folder.rglob("*"))
    assert cli.main(words) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("jmlr: configuration of")]
    assert re.match(rf"jmlr: {re.escape(path)}.*{expected}", said), said
    assert sorted(folder.rglob("*")) == before


BARE = {key: value for key, value in suites.BIOASQ["questions"][1].items() if key != "snippets"}
LONG = suites.MEDQA_5 | {"options": {**suites.MEDQA_5["options"], "A": "very long " * 60}}


def test_a_task_that_mirage_does_not_have(tmp_path):
    path = suites.write_json(tmp_path / "b.json", suites.mirage({**suites.COUNTS, "nurses": 1}))
    with pytest.raises(InputError, match=r"b.json:\d+: questions of 'nurses', which MIRAGE does not have"):
        read_suite(SUITES["mirage"], path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--suite", "mirage"], "--suite mirage needs --questions FILE"),
        (["--questions", "benchmark.json"], "--questions FILE needs --suite NAME"),
    ],
)
def test_a_suite_comes_with_its_file(folder, capsys, words, expected):
    assert cli.main(["eval", "--run-dir", str(folder), *words]) == 2
    assert f"jmlr: {expected}" in capsys.readouterr().err


def test_an_untrained_arm_is_told_before_anything_is_written(folder, tmp_path, capsys):
    path = suites.write_lines(tmp_path / "a.jsonl", suites.MEDXPERTQA)
    words = ["eval", "--run-dir", str(folder), "--arm", "frozen", "--suite", "medxpertqa", "--questions", path]
    assert cli.main(words) == 2
    assert "not been trained" in capsys.readouterr().err and not (folder / "eval" / "medxpertqa").exists()


def test_every_suite_can_be_named():
    assert tuple(SUITES) == get_args(SuiteName)


def test_the_interval_of_a_mean_of_tasks():
    """Each task weighs the same and varies on its own: the standard error of a mean of k is a root of sums over k."""
    few, many = Sample([1.0, 0.0] * 50), Sample([1.0] * 300 + [0.0] * 100)
    found = strata_interval([few, many], resamples=4000)
    assert found.mean == pytest.approx((0.5 + 0.75) / 2)
    error = np.sqrt(0.25 / 100 + 0.1875 / 400) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    alike = strata_interval([few, few], resamples=4000)
    assert alike.high - alike.low == pytest.approx(2 * 1.96 * np.sqrt(0.5 / 100) / 2, rel=0.06), "draws of their own"
    with pytest.raises(ValueError, match="no strata"):
        strata_interval([])
