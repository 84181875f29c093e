"""An exported generator in llama.cpp, beside our own reading of the same folder.

    python benchmarks/llama_cpp_scores.py RUN FOLDER --peer PYTHON --convert SCRIPT [--arm jmlr]
                                          [--split test] [--limit 20]

RUN is the directory of one seed, trained and evaluated. FOLDER gets the generator as `jmlr export` writes it, and a
GGUF file that SCRIPT, llama.cpp's ``convert_hf_to_gguf.py``, makes of it in float32. PYTHON is an interpreter that has
what the script needs (torch, transformers, sentencepiece) and llama-cpp-python. Both then read the prompts of evaluated
questions, passages included: the ids of their text, the scores of the next token, and the answers written with the
likeliest tokens are compared. The result is printed, and lies in FOLDER as ``result.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from exported import exported, opened
from lm_eval_scores import documents

from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.evaluation.evaluate import QUESTIONS
from jmlr_jax.hf.load import load_generator
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate
from jmlr_jax.run.open import Run


def ours(run: Run, folder: Path, prompts: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    """Scores of the token after each prompt, float32 [n, V], and the answers' tokens, the end token left out."""
    cfg, params = load_generator(str(folder), LlamaConfig(max_positions=run.cfg.generator.llama.max_positions))
    length = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), length.max()), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    hidden = F.llama_hidden(params, cfg, ids, length)
    last = np.take_along_axis(np.asarray(hidden), (length - 1)[:, None, None], axis=1)
    scores = np.asarray(F.llama_logits(params, cfg, last), np.float32)[:, 0]
    known = run.prepared.generator_ids
    asked = {"max_new": run.cfg.generator.answer_length, "eos_id": known.eos, "stops": known.stops}
    tokens, made = (np.asarray(x) for x in generate(params, cfg, ids, length, **asked))
    return scores, [
        [t for t in row[:count].tolist() if t not in known.ends] for row, count in zip(tokens, made, strict=True)
    ]


def compared(docs: list[dict[str, Any]], found: tuple[np.ndarray, list[list[int]]], folder: Path) -> dict[str, Any]:
    """How far both are apart."""
    theirs = json.loads((folder / "theirs.json").read_text())
    scores, answers = found
    there = np.load(folder / "theirs.npy")[:, : scores.shape[1]]
    here = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    there = there - np.logaddexp.reduce(there, axis=1, keepdims=True)
    return {
        "prompts": len(docs),
        "same_ids": sum(ids == doc["ids"] for ids, doc in zip(theirs["ids"], docs, strict=True)),
        "same_answers": sum(a == b for a, b in zip(answers, theirs["answers"], strict=True)),
        "answer_tokens": sum(map(len, answers)),
        "largest_difference_of_log_probabilities_above_-10": float(np.abs(here - there)[here > -10].max()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", required=True, help="a Python that has llama-cpp-python, torch and transformers")
    parser.add_argument("--convert", required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--arm", default="jmlr")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=20, help="so many questions, the first")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run, generator = opened(given.run), str(exported(given.run, folder, given.arm) / "generator")
    convert = [given.peer, given.convert, generator, "--outtype", "f32", "--outfile", str(folder / "generator.gguf")]
    subprocess.run(convert, check=True)
    lines = (given.run / "eval" / given.split / given.arm / QUESTIONS).read_text().splitlines()
    docs = documents(run, [json.loads(line) for line in lines[: given.limit]], given.split)
    ids = run.prepared.generator_ids
    task = {"prompts": [doc["prompt"] for doc in docs], "ids": [doc["ids"] for doc in docs]}
    task |= {"stops": ids.ends, "most": run.cfg.generator.answer_length}
    (folder / "task.json").write_text(json.dumps(task))
    found = ours(run, Path(generator), task["ids"])
    subprocess.run([given.peer, str(Path(__file__).with_name("llama_cpp_task.py")), str(folder)], check=True)
    text = json.dumps(compared(docs, found, folder), indent=1)
    (folder / "result.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
