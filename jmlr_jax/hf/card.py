"""The model card of an export, filled from what the run recorded. What was not recorded is said to be missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from jmlr_jax.config import Config
from jmlr_jax.config_models import LlamaConfig, RetrieverConfig
from jmlr_jax.files import AnyPath, any_path

ARM_TEXTS = {
    "jmlr": "retriever and generator trained together",
    "frozen": "the generator alone, with the retriever as it was",
    "separate": "retriever and generator trained one after the other",
    "bm25": "the generator alone, with BM25 passages",
    "random": "the generator alone, with random passages",
    "closed_book": "the generator alone, without passages",
}
_LEGAL = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def model_card(
    cfg: Config,
    arm: str,
    llama: LlamaConfig,
    retriever: RetrieverConfig,
    *,
    prepare: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    chance: float | None,
    index: Mapping[str, Any] | None,
    folders: Mapping[str, tuple[str, str]],
) -> str:
    """Markdown with a YAML header, as Hugging Face shows it.

    Args:
        cfg: the run's configuration.
        arm: which arm is exported.
        llama, retriever: resolved shapes of the two models.
        prepare: content of ``data/prepare.json``; may be empty.
        results: arm -> the numbers of :func:`jmlr_jax.evaluation.report.summarise`; may be empty.
        chance: accuracy of guessing, if known.
        index: the index card; None if there is no index.
        folders: what the export holds: folder -> (what it is, what loads it).
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jmlr_jax", "templates"),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: "-" if x is None else f"{100 * x:.1f}%"
    environment.filters["json"] = lambda x: json.dumps(x, ensure_ascii=False)
    sources = {"generator": cfg.generator.source, "retriever": cfg.retriever.source}
    bases = {part: None if source == "scratch" else source for part, source in sources.items()}
    return environment.get_template("model_card.md").render(
        name=os.path.basename(os.path.normpath(cfg.run_dir)),
        arm=arm,
        arm_text=ARM_TEXTS[arm],
        bases=bases,
        licence={part: base and licence(base) for part, base in bases.items()},
        folders=folders,
        llama=llama,
        bert=retriever.bert,
        retriever=retriever,
        generator=cfg.generator,
        data=cfg.data,
        train=cfg.train,
        seed=cfg.seed,
        split=cfg.eval.split,
        prepare={name: prepare.get(name) for name in ("questions", "passages", "fingerprints", "leakage", "read")},
        results=[{"arm": name, **row} for name, row in results.items()],
        chance=chance,
        index=index,
    )


def licence(source: str) -> str | None:
    """The licence that a model's directory states in the header of its README.md; None if it states none."""
    readme = any_path(source) / "README.md"
    if not readme.exists():
        return None
    _, marker, rest = readme.read_text().partition("---\n")
    header, end, _ = rest.partition("\n---")
    if not marker or not end:
        return None
    try:
        fields = yaml.safe_load(header)
    except yaml.YAMLError:
        return None
    named = [fields.get(key) for key in ("license_name", "license")] if isinstance(fields, dict) else []
    return next((name for name in named if isinstance(name, str) and name), None) if named and named[1] else None


def copy_legal_files(source: str, folder: AnyPath) -> None:
    """Copies the licence texts of a base model, which most of them ask to go along with what is made of it."""
    for name in _LEGAL:
        file = any_path(source) / name
        if file.exists():
            (folder / name).write_bytes(file.read_bytes())
