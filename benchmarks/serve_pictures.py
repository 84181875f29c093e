"""The pictures of docs/serve.md, from a trained run: a question of its test set, answered on the page.

    python benchmarks/serve_pictures.py RUN [--folder docs] [--question ID]

The question is one that the first arm answers right and owes to its passages; the browser is Debian's chromium.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import sync_playwright
from serve_latency import Server

ARMS = ("jmlr", "before")
# name: who is asked beside the first, width in pixels, colours
PICTURES = {
    "serve_answer": ("", 820, "light"),
    "serve_compare": ("before", 1100, "light"),
    "serve_narrow": ("", 390, "dark"),
}


def chosen(run: str, name: str | None) -> dict[str, Any]:
    """The question of that id, or the one right answer that was least likely without passages."""
    file = Path(run, "eval", "test", ARMS[0], "questions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = [row for row in rows if (row["id"] == name if name else row["correct"] and row["generated_correct"])]
    found: dict[str, Any] = max(right, key=lambda row: row["nll_none"] - row["option_nll"][row["answer"]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--folder", default="docs")
    parser.add_argument("--question")
    args = parser.parse_args()
    row = chosen(args.run, args.question)
    print(row["id"], row["question"], row["option_texts"])
    asked = {"q": row["question"], "options": "\n".join(row["option_texts"]), "arm": ARMS[0], "anyway": 1}
    words = [word for arm in ARMS for word in ("--arm", arm)]
    with Server(args.run, *words) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        )
        for name, (beside, width, colours) in PICTURES.items():
            page = browser.new_page(viewport={"width": width, "height": 600}, color_scheme=colours)  # type: ignore[arg-type]
            page.goto(f"{server.url}/ask?{urlencode({**asked, 'beside': beside})}", timeout=120_000)
            shown = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
            few = shown.quantize(128, dither=Image.Dither.NONE)
            few.save(Path(args.folder, f"{name}.png"), optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
