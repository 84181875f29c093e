"""The likelihoods of `jmlr eval` beside those of lm-evaluation-harness, on the same prompts.

    python benchmarks/lm_eval_scores.py RUN FOLDER --peer PYTHON [--split test] [--arms jmlr closed_book] [--limit N]

RUN is the directory of one seed, trained and evaluated. For each arm, FOLDER gets the generator as `jmlr export` writes
it, and a local task of the harness: the prompts of the evaluated questions as text, passages included, and the options
that follow, end token included. PYTHON is an interpreter that has lm-eval, transformers and torch (an environment of
its own: `pip install torch lm-eval transformers accelerate`); it scores every option in float32. Then the summed
log-likelihood of each option and the option that it picks are compared with those in ``questions.jsonl``, which the
arm's evaluation wrote. Texts are cut and joined by token here, and tokenised as one text there: a prompt whose tokens
differ is counted apart. The result is printed, and lies in FOLDER as ``result.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from exported import exported, opened

from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.evaluation.evaluate import QUESTIONS
from jmlr_jax.evaluation.reading import Reader, Setting, question_batch
from jmlr_jax.method.prompt import read_prompt, reading_width
from jmlr_jax.run.open import Run

TASK = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def documents(run: Run, rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """What was read of each evaluated question, as text, with the ids that it stands for."""
    prepared, cfg = run.prepared, run.cfg
    tokenizer = load_tokenizer(prepared.tokenizer_dir("generator"))
    ids = prepared.generator_ids
    places = {question.id: place for place, question in enumerate(prepared.questions(split))}
    passages = {passage.id: place for place, passage in enumerate(prepared.passages)}
    reader = Reader({}, run.llama, tokenizer.decode)  # its weights are not asked for
    setting, made = Setting(reader, prepared, split, cfg), []

    def text(tokens: np.ndarray) -> str:
        return str(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))

    for row in rows:
        table = np.array([[passages[name] for name in row["passages"]]], np.int32)
        batch = question_batch(setting, np.array([places[row["id"]]]), table)
        after = batch["option_ids_BxOxA"].shape[-1]
        total = reading_width(batch, cfg.generator.max_length, after, ids.begin) - after
        prompt, length, _ = (np.asarray(x) for x in read_prompt(batch, total=total, bos_id=ids.begin, pad_id=ids.pad))
        options = zip(batch["option_ids_BxOxA"][0, 1:], batch["option_len_BxO"][0, 1:], strict=True)
        option_ids = [x[:count] for x, count in list(options)[: row["options"]]]
        prompt_ids = prompt[0, : length[0]]
        prompt_text, option_texts = text(prompt_ids), [text(x) for x in option_ids]
        same = [
            tokenizer(prompt_text + option, add_special_tokens=False).input_ids == [*prompt_ids.tolist(), *x.tolist()]
            for option, x in zip(option_texts, option_ids, strict=True)
        ]
        made.append(
            {
                "prompt": prompt_text,
                "ids": prompt_ids.tolist(),
                "options": option_texts,
                "answer": row["answer"],
                "same": all(same),
                "ours": [-nll * len(x) for nll, x in zip(row["option_nll"], option_ids, strict=True)],
            }
        )
    return made


def compared(ours: list[dict[str, Any]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of summed log-likelihoods, in nats, and how often both pick the same option."""
    theirs = {sample["doc_id"]: [float(found[0][0]) for found in sample["resps"]] for sample in samples}
    apart, agree, right = [], 0, [0, 0]
    for number, doc in enumerate(ours):
        picked = int(np.argmax(doc["ours"])), int(np.argmax(theirs[number]))
        agree += picked[0] == picked[1]
        right = [count + (pick == doc["answer"]) for count, pick in zip(right, picked, strict=True)]
        if doc["same"]:
            apart += [abs(a - b) for a, b in zip(doc["ours"], theirs[number], strict=True)]
    return {
        "questions": len(ours),
        "tokenised_otherwise": sum(not doc["same"] for doc in ours),
        "options_compared": len(apart),
        "largest_difference_nats": max(apart),
        "mean_difference_nats": float(np.mean(apart)),
        "same_pick": agree / len(ours),
        "accuracy_sum_here": right[0] / len(ours),
        "accuracy_there": right[1] / len(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", required=True, help="a Python that has lm-eval")
    parser.add_argument("--split", default="test")
    parser.add_argument("--arms", nargs="+", default=["jmlr", "closed_book"])
    parser.add_argument("--limit", type=int, help="so many questions, the first")
    given = parser.parse_args()
    folder, result = given.folder.resolve(), {}
    folder.mkdir(parents=True, exist_ok=True)
    run = opened(given.run)
    for arm in given.arms:
        lines = (given.run / "eval" / given.split / arm / QUESTIONS).read_text().splitlines()
        ours = documents(run, [json.loads(line) for line in lines[: given.limit]], given.split)
        data, name = folder / f"{arm}.jsonl", f"jmlr_{arm}"
        shown = ("prompt", "options", "answer")
        data.write_text("".join(json.dumps({key: doc[key] for key in shown}) + "\n" for doc in ours))
        task = TASK | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        model = f"pretrained={exported(given.run, folder, arm) / 'generator'},dtype=float32,add_bos_token=False"
        options = ["--model", "hf", "--model_args", model, "--device", "cpu", "--batch_size", "4"]
        options += ["--include_path", str(folder), "--tasks", name, "--log_samples", "--output_path", str(folder / arm)]
        subprocess.run([given.peer, "-m", "lm_eval", *options], check=True)
        latest = max((folder / arm).rglob(f"samples_{name}_*.jsonl"), key=lambda path: path.stat().st_mtime)
        result[arm] = compared(ours, [json.loads(line) for line in latest.read_text().splitlines()])
    text = json.dumps(result, indent=1)
    (folder / "result.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
