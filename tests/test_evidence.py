"""What a report says of effects, trust and cost, on made-up runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_runs import EVIL, made_rows, write_arm, write_questions, write_rest

from jmlr_jax.evaluation.calibration import calibration_error, fit_temperature, options_of, sureness
from jmlr_jax.evaluation.report import report
from jmlr_jax.evaluation.seed_run import read_run, seed_folders
from jmlr_jax.evaluation.summary import summarise, worlds_of
from jmlr_jax.run.artifact import Recipe

PARTS = {"encode": 1e9, "judge": 2e9, "read": 3e9, "index": 0.5e9}


def write_cost(folder, phase, seconds, scale=1.0):
    (folder / "arms" / phase).mkdir(parents=True, exist_ok=True)
    cost = {"seconds": seconds, "flops": {part: scale * flops for part, flops in PARTS.items()}}
    (folder / "arms" / phase / "cost.json").write_text(json.dumps(cost))


def two_seeds(root, arms=("jmlr", "closed_book")):
    for seed in (0, 1):
        for i, arm in enumerate(arms):
            write_arm(root / f"seed_{seed}", arm, 0.8 - 0.4 * i, seed=seed)
        write_rest(root / f"seed_{seed}", seed)
    return root


def runs_of(root):
    return [read_run(folder, folder.name, "test") for folder in seed_folders(Path(root))]


def rows_of(root, seed, arm):
    file = root / f"seed_{seed}" / "eval" / "test" / arm / "questions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def summary_of(root, **named):
    return summarise(runs_of(root), 50, **named)


def test_effects_are_counted_within_seeds(tmp_path):
    root = two_seeds(tmp_path)
    found = summary_of(root)["effects"]["jmlr"]
    helped = []
    for seed in (0, 1):
        pairs = zip(rows_of(root, seed, "jmlr"), rows_of(root, seed, "closed_book"), strict=True)
        helped.append(np.mean([a["correct"] and not b["correct"] for a, b in pairs]))
    assert found["helped"]["mean"] == pytest.approx(np.mean(helped)) and found["helped"]["n"] == 80
    kinds = ("helped", "harmed", "unchanged_right", "unchanged_wrong")
    assert sum(found[kind]["mean"] for kind in kinds) == pytest.approx(1)
    assert "conditions" not in found and "closed_book" not in summary_of(root)["effects"]


def test_seeds_with_other_questions_are_other_worlds(tmp_path):
    root = two_seeds(tmp_path)
    runs = runs_of(root)
    assert worlds_of(runs) == {"seed_0": 0, "seed_1": 0}
    for row in runs[1].rows["jmlr"] + runs[1].rows["closed_book"]:
        row["question"] = f"another {row['question']}"  # under the same id and group
    assert worlds_of(runs) == {"seed_0": 0, "seed_1": 1}
    assert summarise(runs, 200)["arms"]["jmlr"]["low"] != summary_of(root)["arms"]["jmlr"]["low"]


def test_without_dev_nothing_is_calibrated_and_it_says_so(tmp_path):
    root = two_seeds(tmp_path)
    found = summary_of(root)["trust"]["jmlr"]
    assert found["uncalibrated"] == "no dev evaluation of seed_0, seed_1"
    assert found["temperature"] is found["threshold"] is found["given"] is None
    assert found["calibration_error"] == found["calibration_error_raw"]
    page = report(root, resamples=20, quiet=True).read_text()
    assert "Not calibrated: no dev evaluation of seed_0, seed_1" in page and "not calibrated</td>" in page


def test_dev_gives_temperature_and_threshold(tmp_path):
    root = two_seeds(tmp_path)
    temperatures = []
    for seed in (0, 1):
        dev = made_rows(np.random.default_rng(9 + seed), 0.7, 60)
        write_questions(root / f"seed_{seed}" / "eval" / "dev" / "jmlr", dev)
        temperatures.append(fit_temperature(options_of(dev)))
    found = summary_of(root, max_risk=0.25)["trust"]["jmlr"]
    assert found["uncalibrated"] is None and found["dev_questions"] == 120
    assert found["temperature"] == pytest.approx(temperatures)
    wrong = given = 0
    confidences, rights = [], []
    for seed in (0, 1):
        sure = sureness(options_of(rows_of(root, seed, "jmlr")), temperatures[seed])
        kept = sure.confidence_N >= found["threshold"][seed]
        wrong, given = wrong + int((~sure.correct_N[kept]).sum()), given + int(kept.sum())
        confidences.append(sure.confidence_N)
        rights.append(sure.correct_N)
    assert found["given"] == pytest.approx({"coverage": given / 80, "risk": wrong / given})
    both = type(sure)(np.concatenate(confidences), np.concatenate(rights))
    assert found["calibration_error"] == pytest.approx(calibration_error(both)) != found["calibration_error_raw"]
    assert found["risk_coverage"][-1] == pytest.approx([1.0, np.mean(~both.correct_N)])
    never = summary_of(root, max_risk=0.0)["trust"]["jmlr"]
    assert never["given"] is None or never["given"]["risk"] < 1
    page = report(root, resamples=20, quiet=True).read_text()
    assert page.count('src="data:image/png') == 5 and (root / "reliability.png").exists()


def test_dev_of_other_weights_calibrates_nothing(tmp_path):
    for split in ("dev", "test"):
        write_questions(tmp_path / "eval" / split / "jmlr", made_rows(np.random.default_rng(0), 0.7, 20))
        made = Recipe(tmp_path / "eval" / split / "jmlr", {"eval.max_questions": len(split)}, {"arms/jmlr": split})
        made.write()
    (tmp_path / "config.yaml").write_text("eval: {arms: [jmlr]}")
    run = read_run(Path(tmp_path), "run", "test")
    assert run.dev == {} and any("dev/jmlr (arms/jmlr differ" in line for line in run.missing)
    probed = {"eval.max_questions": 3, "retriever.dim": 8}  # the dev evaluation has a probe that reads more
    Recipe(tmp_path / "eval" / "dev" / "jmlr", probed, {"arms/jmlr": "test"}).write()
    assert len(read_run(Path(tmp_path), "run", "test").dev["jmlr"]) == 20
    assert read_run(Path(tmp_path), "run", "dev").dev == {}


def test_probes_are_shown(tmp_path):
    rows = made_rows(np.random.default_rng(0), 0.5, 20)
    for i, row in enumerate(rows):
        row |= {"nll_none": 1.0, "orders": [1, 1, 2, 1], "passages": [EVIL]}
        row["conditions"] = {"gold": {"prediction": 1, "correct": i < 15, "nll": 1.0}, "random": None}
        row["judged"] = [{"id": EVIL, "nll": 0.5 + i % 2, "read": True, "score": float(i), "score_before": None}]
    write_questions(tmp_path / "eval" / "test" / "bm25", rows)
    (tmp_path / "eval" / "test" / "bm25" / "summary.json").write_text('{"accuracy": 0.5}')
    page = report(tmp_path, resamples=50, quiet=True).read_text()
    found = json.loads((tmp_path / "report.json").read_text())["effects"]["bm25"]
    assert found["conditions"]["gold"]["mean"] == 0.75 and found["orders"]["moved"]["mean"] == 1.0
    assert found["passages"]["helpful"]["mean"] == 0.5 and "before" not in found["passages"]["auc"]
    assert "75.0%" in page and "Single passages" in page and "helped" not in found and "<script" not in page


def test_cost_includes_the_phases_before(tmp_path):
    root = two_seeds(tmp_path, ("jmlr", "separate"))
    for seed in (0, 1):
        for phase, seconds in (("warmup", 10.0), ("jmlr", 5.0 + seed), ("separate_retriever", 4.0), ("separate", 3.0)):
            folder = root / f"seed_{seed}"
            write_cost(folder, phase, seconds, 2.0 if phase == "warmup" else 1.0)
            for name in ("metrics.jsonl", "speed.jsonl"):
                (folder / "arms" / phase / name).touch()
    found = summary_of(root)["cost"]
    each = sum(PARTS.values())
    assert found["jmlr"] == {"phases": ["warmup", "jmlr"], "flops": pytest.approx(3 * each), "seconds": 15.5}
    assert found["separate"]["flops"] == pytest.approx(4 * each) and found["separate"]["seconds"] == 17.0
    report(root, resamples=20, quiet=True)
    assert (root / "cost.png").read_bytes().startswith(b"\x89PNG")
    for seed in (0, 1):
        (root / f"seed_{seed}" / "arms" / "separate_retriever" / "cost.json").unlink()
    assert set(summary_of(root)["cost"]) == {"jmlr"}  # what is not known whole is not said
