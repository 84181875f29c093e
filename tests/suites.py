"""Small files of published question sets, in their makers' formats; every text is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COUNTS = {"medqa": 5, "medmcqa": 4, "pubmedqa": 3, "bioasq": 3, "mmlu": 4}  # in the order of the published file
YES_NO = {"A": "yes", "B": "no", "C": "maybe"}


def mirage(counts: dict[str, int] = COUNTS) -> dict[str, dict[str, Any]]:
    """A ``benchmark.json`` with so many questions of each task."""
    found: dict[str, dict[str, Any]] = {}
    for task, count in counts.items():
        found[task] = {}
        for n in range(count):
            options = {"A": f"zol{n}", "B": f"amine {n}", "C": f"statin {n}", "D": f"heparin {n}"}
            if task in ("pubmedqa", "bioasq"):
                options = dict(list(YES_NO.items())[: 3 if task == "pubmedqa" else 2])
            record = {"question": f"Which drug of {task} helps against case {n}?", "options": options}
            record["answer"] = list(options)[n % len(options)]
            found[task][f"{n:04d}"] = record | ({"PMID": [100 + n]} if len(options) < 4 else {})
    return found


def write_json(path: Path, content: Any) -> str:
    """The file with this content, indented as published ones are."""
    path.write_text(json.dumps(content, indent=1))
    return str(path)


def write_lines(path: Path, *records: dict[str, Any]) -> str:
    """The same as a JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


LETTERED = {letter: f"drug {letter}" for letter in "ABCDEFGHIJ"}
MEDXPERTQA = {
    "id": "Text-7",
    "question": "A boy coughs.\nWhich is best?\nAnswer Choices: (A) drug A (B) drug B (C) drug C",
    "options": LETTERED,
    "label": "J",
    "medical_task": "Treatment",
    "body_system": "Respiratory",
    "question_type": "Reasoning",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "Which cell?",
    "options": list(LETTERED.values()),
    "answer": "I",
    "answer_index": 8,
    "cot_content": "",
    "category": "health",
    "src": "ori",
}
MEDQA_5 = {
    "question": "Which of five?",
    "answer": "drug E",
    "options": {letter: LETTERED[letter] for letter in "ABCDE"},
    "meta_info": "step1",
    "answer_idx": "E",
}
SNIPPETS = [
    {"text": text, "document": f"http://www.ncbi.nlm.nih.gov/pubmed/{n}", "beginSection": "abstract"}
    for n, text in enumerate(("Zol lowers it.", "Amine does not.", "Zol lowers it."))
]
BIOASQ = {
    "questions": [
        {"id": "b0", "body": "Name the gene.", "type": "factoid", "exact_answer": [["abc1"]], "snippets": SNIPPETS},
        {"id": "b1", "body": "Does zol help?", "type": "yesno", "exact_answer": "yes", "snippets": SNIPPETS},
        {"id": "b2", "body": "Does amine help?", "type": "yesno", "exact_answer": ["No"], "snippets": SNIPPETS[1:2]},
    ]
}
PUBMEDQA = {
    str(pmid): {
        "QUESTION": f"Does drug {pmid} help?",
        "CONTEXTS": [f"Group {pmid} was asked.", f"It got better by {pmid}.", f"The rest of {pmid} did not."],
        "LABELS": ["BACKGROUND", "METHODS", "RESULTS"],
        "final_decision": said,
        "LONG_ANSWER": "It did.",
    }
    for pmid, said in ((11, "yes"), (12, "maybe"))
}
