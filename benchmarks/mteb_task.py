"""The side of ``mteb_scores.py`` that runs in an environment with mteb: a task in files, one model, two rankings.

python mteb_task.py FOLDER MODEL DEPTH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import MultiVectorEncoder

MEASURES = ("ndcg@10", "recall@1", "recall@10", "recall@100", "mrr@10")


class LocalRetrieval(AbsTaskRetrieval):
    """Passages, questions and gold passages from the files of a folder."""

    folder: Path
    metadata = TaskMetadata(
        name="LocalRetrieval",
        description="Questions and passages of a prepared run.",
        dataset={"path": "local", "revision": "local"},
        type="Retrieval",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        bibtex_citation="",
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Reads the files in place of a download."""
        corpus, queries = (
            Dataset.from_list([json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()])
            for name in ("corpus", "queries")
        )
        relevant = json.loads((self.folder / "relevant.json").read_text())
        data = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": data}}, True


def main() -> None:
    """Command line."""
    folder, model, depth = Path(sys.argv[1]), MultiVectorEncoder(sys.argv[2], device="cpu"), int(sys.argv[3])
    task = LocalRetrieval()
    task.folder = folder
    task._top_k = depth
    found = mteb.evaluate(model, task, cache=None, prediction_folder=folder / "predictions", show_progress_bar=False)
    there = found.task_results[0].scores["test"][0]
    file = next((folder / "predictions").rglob("*_predictions.json"))
    theirs = json.loads(file.read_text())["default"]["test"]
    ours = json.loads((folder / "ranking.json").read_text())
    relevant = json.loads((folder / "relevant.json").read_text())
    apart, same, most, first = [], 0, 0, 0
    for name, ranked in ours.items():
        best = sorted(theirs[name], key=theirs[name].get, reverse=True)[:10]
        mine = sorted(ranked, key=ranked.get, reverse=True)[:10]
        same, most = same + len(set(best) & set(mine)), most + len(mine)
        first += best[0] == mine[0]
        apart += [abs(ranked[key] - theirs[name][key]) for key in set(ranked) & set(theirs[name])]
    scored = calculate_retrieval_scores(ours, relevant, (1, 10, 100))
    measured = {
        name: getattr(scored, name.partition("@")[0])[name.upper().replace("RECALL", "Recall")] for name in MEASURES
    }
    result = {
        "mteb": mteb.__version__,
        "questions": len(ours),
        "passages": sum(1 for _ in (folder / "corpus.jsonl").open()),
        "there": {name: there[name.replace("@", "_at_")] for name in MEASURES},
        "here": measured,
        "same_first": first / len(ours),
        "same_of_ten": same / most,
        "largest_difference_of_scores": max(apart),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
