"""The side of ``llama_cpp_scores.py`` that runs in an environment with llama-cpp-python.

python llama_cpp_task.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Reads ``task.json`` and ``generator.gguf``, writes ``theirs.json`` and ``theirs.npy``."""
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    longest = max(map(len, task["ids"])) + task["most"]
    model = Llama(str(folder / "generator.gguf"), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False)
    scores, ids, answers = [], [], []
    for text, prompt in zip(task["prompts"], task["ids"], strict=True):
        ids.append(model.tokenize(text.encode(), add_bos=False, special=True))
        model.reset()
        model.eval(prompt)
        scores.append(model.scores[model.n_tokens - 1].copy())
        answer: list[int] = []
        while len(answer) < task["most"]:
            token = int(np.argmax(model.scores[model.n_tokens - 1]))
            if token in task["stops"]:
                break
            answer.append(token)
            model.eval([token])
        answers.append(answer)
    np.save(folder / "theirs.npy", np.stack(scores))
    (folder / "theirs.json").write_text(json.dumps({"ids": ids, "answers": answers}))


if __name__ == "__main__":
    main()
