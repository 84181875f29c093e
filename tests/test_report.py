"""Reports of small made-up run directories: numbers, missing files, escaping."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import write_arm, write_rest

from jmlr_jax.errors import JmlrError
from jmlr_jax.evaluation import figures
from jmlr_jax.evaluation.figures import PANELS
from jmlr_jax.evaluation.intervals import Sample, seeds_interval
from jmlr_jax.evaluation.report import report
from jmlr_jax.evaluation.seed_run import ARMS, curves_by_metric, read_run


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Two seeds with every arm; returns (folder, page, report.json, {(seed, arm): (accuracy, rows)})."""
    root = tmp_path_factory.mktemp("run")
    truth = {}
    for seed in (0, 1):
        folder = root / f"seed_{seed}"
        for i, arm in enumerate(ARMS):
            truth[seed, arm] = write_arm(folder, arm, 0.9 - 0.1 * i, seed=seed, evil=arm == "jmlr")
        write_rest(folder, seed)
    page = report(root, resamples=300)
    return root, page.read_text(), json.loads((root / "report.json").read_text()), truth


def test_report_json_has_the_agreed_form(full):
    _, _, content, _ = full
    assert set(content["arms"]) == {"jmlr", "frozen", "closed_book", "random", "bm25", "separate"}
    for row in content["arms"].values():
        assert all(isinstance(row[key], int | float) for key in ("accuracy", "low", "high", "n", "unparsed"))
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    for metric in ("hit@1", "hit@5"):
        assert set(content["retriever"][metric]) == {"before", "after"}
    assert content["seeds"] == 2
    assert set(content["seconds"]) == {"train", "total"}
    assert content["missing"] == []


def test_numbers_over_seeds(full):
    _, _, content, truth = full
    for arm, row in content["arms"].items():
        accuracies = [truth[seed, arm][0] for seed in (0, 1)]
        rows = truth[0, arm][1] + truth[1, arm][1]
        assert row["per_seed"] == pytest.approx(accuracies) and row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert (row["n"], row["unparsed"]) == (80, 8)
        # Both seeds were asked the same questions, whose draw they share.
        samples = [
            Sample([float(r["correct"]) for r in truth[seed, arm][1]], [r["group"] for r in rows[:40]], "one")
            for seed in (0, 1)
        ]
        both = seeds_interval(samples, resamples=300)
        assert (row["low"], row["high"]) == pytest.approx((both.low, both.high))
        assert row["nll"] == pytest.approx(1.0) and row["nll_gain"] == pytest.approx(1.0)
        assert sum(kind["n"] for kind in row["by_kind"].values()) == 80
    assert content["retriever"]["hit@1"] == pytest.approx({"before": 0.25, "after": 0.7})
    assert "n" not in content["retriever"]
    assert content["retriever_by_arm"]["bm25"]["hit@1"] == pytest.approx(0.25)
    assert content["seconds"] == {"train": 11.0, "total": 30.0}
    assert content["chance"] == 0.25


def test_differences_are_paired_by_seed_and_question(full):
    _, _, content, truth = full
    assert set(content["differences"]) == set(ARMS) - {"jmlr"}
    for arm, row in content["differences"].items():
        expected = [
            a["correct"] - b["correct"]
            for seed in (0, 1)
            for a, b in zip(truth[seed, "jmlr"][1], truth[seed, arm][1], strict=True)
        ]
        assert row["mean"] == pytest.approx(np.mean(expected)) and row["n"] == 80
        assert row["low"] <= row["mean"] <= row["high"] and 0 < row["p"] <= 1


def test_page_escapes_everything_and_stands_alone(full):
    _, page, _, _ = full
    assert "<script" not in page and '<b>"' not in page
    assert "&lt;script&gt;alert" in page
    assert page.count('src="data:image/png;base64,') == 5
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for arm_text in ("JMLR (joint)", "BM25", "closed book"):
        assert arm_text in page
    assert "How to read this" in page and "notes.file" in page and "(9 in all)" in page


def test_figures_are_images(full):
    root, _, _, _ = full
    for name in ("accuracy.png", "training.png", "retriever.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")
    assert not list(root.glob(".*partial"))


def test_curves_come_from_both_files_and_the_warmup_stands_apart(tmp_path):
    write_arm(tmp_path, "jmlr", 0.8)
    (tmp_path / "arms" / "warmup").mkdir()
    (tmp_path / "arms" / "warmup" / "metrics.jsonl").write_text('{"step": 7, "loss/answer": 2.0}\n')
    run = read_run(tmp_path, "run", "test")
    jmlr = run.curves["jmlr"]
    assert jmlr["speed/tokens_per_s"] == [(10, 100.0)] and jmlr["dev/loss"] == [(20, 0.5)]
    assert len(jmlr["loss/answer"]) == 30
    assert "run: warmup/speed.jsonl" in run.missing and "run: warmup/metrics.jsonl" not in run.missing
    drawn = curves_by_metric([run])
    assert drawn["warmup/loss/answer"] == {"warmup": [[(7, 2.0)]]} and set(drawn["loss/answer"]) == {"jmlr"}
    assert {"warmup/loss/answer", "dev/loss", "speed/tokens_per_s"} <= PANELS.keys() & drawn.keys()


def test_what_training_logs_has_a_panel():
    """Names are agreed on between three files; a renamed metric would vanish from the figure unnoticed."""
    package = Path(figures.__file__).parent.parent
    logging = "".join(
        (package / name).read_text()
        for name in ("method/step.py", "run/candidates.py", "training/metrics_log.py", "training/checkpoint.py")
    )
    for metric in PANELS:
        assert f'"{metric.removeprefix("warmup/")}"' in logging, metric


def test_single_run_directory_with_gaps(tmp_path, capsys):
    write_arm(tmp_path, "jmlr", 0.8)
    write_arm(tmp_path, "bm25", 0.5)
    (tmp_path / "eval" / "test" / "bm25" / "questions.jsonl").unlink()  # the summary has to do
    (tmp_path / "timing.json").write_text("{broken")
    with (tmp_path / "arms" / "jmlr" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 29, "loss/answer": NaN}\n{"step": 30, "loss/ans')
    page = report(tmp_path, resamples=100).read_text()
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content["arms"]) == {"jmlr", "bm25"} and content["seeds"] == 1
    assert content["arms"]["bm25"]["high"] == pytest.approx(content["arms"]["bm25"]["accuracy"] + 0.1)
    assert (content["arms"]["bm25"]["n"], content["arms"]["bm25"]["unparsed"]) == (40, 4)
    assert content["differences"] == {} and content["retriever"]["hit@1"] == {"after": 0.7}
    assert content["seconds"] == {"train": None, "total": None}
    missing = "\n".join(content["missing"])
    for name in (
        "config.yaml",
        "frozen/summary.json",
        "bm25/questions.jsonl",
        "initial/summary.json",
        "prepare.json",
        "timing.json (not read",
    ):
        assert name in missing
    assert "1 unreadable line " in missing
    assert "frozen/summary.json" in page
    printed = capsys.readouterr().out
    assert "JMLR" in printed and "missing:" in printed


def test_only_configured_arms_are_missed(tmp_path):
    (tmp_path / "config.yaml").write_text("eval:\n  arms: [jmlr, bm25]\n")
    report(tmp_path, quiet=True)
    missing = "\n".join(json.loads((tmp_path / "report.json").read_text())["missing"])
    assert "jmlr/summary.json" in missing and "bm25/summary.json" in missing and "frozen" not in missing


def test_empty_directory_and_no_directory(tmp_path, capsys):
    page = report(tmp_path, quiet=True).read_text()
    assert "No arm has been evaluated yet" in page and capsys.readouterr().out == ""
    assert json.loads((tmp_path / "report.json").read_text())["arms"] == {}
    with pytest.raises(JmlrError, match="no such run directory"):
        report(tmp_path / "nowhere")


def test_seeds_are_in_numeric_order(tmp_path):
    for seed in (10, 2):
        write_arm(tmp_path / f"seed_{seed}", "jmlr", 1.0 if seed == 2 else 0.0)
    report(tmp_path, resamples=50, quiet=True)
    assert json.loads((tmp_path / "report.json").read_text())["arms"]["jmlr"]["per_seed"] == [1.0, 0.0]
