"""Run directories as evaluations and training leave them, made up."""

import json

import numpy as np

from jmlr_jax.evaluation.seed_run import ARMS

EVIL = "<script>alert('x')</script> & \"quotes\""


AFTER = {"hit@1": 0.7, "hit@5": 0.9, "mrr@10": 0.8, "ndcg@10": 0.8, "n": 40}


def scores(seed):
    """Ranking metrics of the retriever before training."""
    return {"hit@1": 0.2 + 0.1 * seed, "hit@5": 0.4, "mrr@10": 0.3, "ndcg@10": 0.3, "n": 40}


def write_questions(place, rows):
    place.mkdir(parents=True, exist_ok=True)
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_rows(rng, accuracy, n, evil=False):
    """Questions of which so many are right, the surer the answer the likelier."""
    rows = []
    for i in range(n):
        correct = bool(rng.random() < accuracy)
        chosen = 1 if correct else 2
        nll = [2.0 - (1.5 * rng.random() + correct) * (option == chosen) for option in range(4)]
        rows.append(
            {
                "id": f"q{i}",
                "question": EVIL if evil else f"Question {i}?",
                "kind": EVIL if evil and i % 2 else "a.b",
                "group": f"g{i // 4}",
                "options": 4,
                "option_texts": ["w", EVIL if evil else "x", "y", "z"],
                "answer": 1,
                "prediction": chosen,
                "option_nll": nll,
                "correct": correct,
                "generated": EVIL if evil else "x",
                "parsed": None if i % 10 == 0 else 1,
                "generated_correct": i % 10 != 0,
                "passages": [EVIL if evil else "p1"],
            }
        )
    return rows


def write_arm(folder, arm, accuracy, n=40, seed=0, evil=False):
    """An arm's evaluation and training; its accuracy and rows."""
    rows = made_rows(np.random.default_rng([seed, ARMS.index(arm)]), accuracy, n, evil)
    mean = float(np.mean([row["correct"] for row in rows]))
    place = folder / "eval" / "test" / arm
    write_questions(place, rows)
    summary = {
        "arm": arm,
        "n": n,
        "accuracy": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
        "accuracy_sum": mean,
        "chance": 0.25,
        "generation": {"accuracy": 0.9, "low": 0.8, "high": 1.0, "unparsed": 4},
        "nll": {"with_passages": 0.5 + seed, "without_passages": 1.5 + seed, "gain": 1.0},
        "retrieval": {"jmlr": AFTER, "bm25": scores(seed)}.get(arm),
    }
    (place / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": s, "loss/answer": 3.0 / (1 + s), "rank/pair_accuracy": 0.5 + s / 100} for s in range(30)]
    (folder / "arms" / arm).mkdir(parents=True)
    lines.append({"step": 20, "dev/loss": 0.5 + seed})
    (folder / "arms" / arm / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "arms" / arm / "speed.jsonl").write_text(json.dumps({"step": 10, "speed/tokens_per_s": 100.0}) + "\n")
    return mean, rows


def write_rest(folder, seed=0):
    place = folder / "eval" / "test" / "initial"
    place.mkdir(parents=True, exist_ok=True)
    (place / "summary.json").write_text(json.dumps({"arm": "initial", "retrieval": scores(seed)}))
    (folder / "timing.json").write_text(json.dumps({"train": 10.0 + 2 * seed, "total": 30.0}))
    (folder / "data").mkdir()
    (folder / "data" / "prepare.json").write_text(
        json.dumps({"passages": 12, "notes": {"file": EVIL, "rows": [1] * 9}})
    )
    (folder / "config.yaml").write_text(f'seed: {seed}\nrun_dir: "{folder.name} <b>"\n')
