"""What PyLate makes of exported retrievers: token ids, masks and MaxSim scores, recorded for the tests.

PyLate 1.6.0 asks for older releases of transformers and tokenizers than this project, so it runs in an environment of
its own, and tests/test_hf_colbert.py compares with the record:

    python tests/hf_colbert.py /tmp/exported
    python3.11 -m venv /tmp/pylate && /tmp/pylate/bin/pip install torch pylate==1.6.0
    /tmp/pylate/bin/python benchmarks/pylate_reference.py /tmp/exported tests/pylate_reference.json
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from pylate import models
from pylate.scores import colbert_scores


def record(directory: Path, texts: dict[str, list[str]]) -> dict[str, object]:
    """Ids, attention masks, numbers of kept vectors, and scores [queries][passages] of one exported directory."""
    model = models.ColBERT(str(directory), device="cpu")
    found: dict[str, object] = {}
    vectors = {}
    for side in ("queries", "passages"):
        asked = side == "queries"
        tokens = [model.tokenize([text], is_query=asked) for text in texts[side]]
        found[f"{side}_ids"] = [row["input_ids"][0].tolist() for row in tokens]
        found[f"{side}_mask"] = [row["attention_mask"][0].tolist() for row in tokens]
        vectors[side] = [
            model.encode([text], is_query=asked, convert_to_tensor=True, show_progress_bar=False)[0]
            for text in texts[side]
        ]
        found[f"{side}_kept"] = [len(row) for row in vectors[side]]
        found[f"{side}_first"] = [row[0].tolist() if len(row) else [] for row in vectors[side]]
    found["scores"] = [
        [colbert_scores(q[None], p[None]).item() if len(p) else None for p in vectors["passages"]]
        for q in vectors["queries"]
    ]
    return found


def main() -> None:
    """Command line: folder of exports, file to write."""
    folder, out = map(Path, sys.argv[1:])
    texts = json.loads((folder / "texts.json").read_text())
    with torch.no_grad():
        found = {
            f"{path.parent.name}/{path.name}": record(path, texts)
            for path in sorted(folder.glob("*/*"))
            if (path / "config.json").exists()
        }
    versions = {name: version(name) for name in ("pylate", "sentence-transformers", "transformers", "torch")}
    out.write_text(json.dumps({"versions": versions, "texts": texts, "found": found}) + "\n")


if __name__ == "__main__":
    main()
