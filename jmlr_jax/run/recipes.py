"""What each artifact of a run is made from: the chain data -> weights of a phase -> index -> evaluation.

A recipe lists the keys that shape its artifact and leaves out those that only say where or how fast it is made: mesh,
precision of progress, how often is logged, recomputation in the backward pass, batch sizes without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jmlr_jax.config import Config
from jmlr_jax.data import world
from jmlr_jax.data.schema import SPLITS
from jmlr_jax.files import absolute, digest
from jmlr_jax.run.artifact import Recipe
from jmlr_jax.run.phases import PHASES, Phase

# Keys of the models that are no part of them: where they come from is an input, recomputation changes rounding alone.
NOT_SHAPE = ("source", "tokenizer", "bert.remat", "llama.remat")
TEXT_ONLY = (
    "source",
    "tokenizer",
    "bert",
    "llama",
    "lora",
    "dim",
    "importance",
    "attend_to_mask_tokens",
    "copy_init",
    "max_length",
)
RANKING = ("retriever", "importance", "rank_loss", "rank_weight", "help_margin", "sampled")
LIVE = ("candidates", "mix", "refresh_steps", "refresh_delay")


def data_recipe(cfg: Config, folder: Path, made: Recipe | None = None) -> Recipe:
    """Questions, passages, tokenizers and tokens.

    Args:
      made: what `folder` was made from. Inputs that lie where they lay then are taken to be the same, so that a run can
        be used where they are gone; only `jmlr prepare` reads them again.
    """
    embedded = cfg.data.questions == "world"
    paths = tuple(f"{name}_path" for name in (*SPLITS, "corpus"))
    keys = _keys("data", cfg.data, leave=(*paths, *(() if embedded else ("world",))))
    keys |= {"seed": cfg.seed} if embedded else {}
    keys |= _text_keys(cfg)
    keys["retriever.bert.vocab_size"] = cfg.retriever.bert.vocab_size
    keys["generator.llama.vocab_size"] = cfg.generator.llama.vocab_size
    places = {f"data.{name}": getattr(cfg.data, name) for name in paths if not embedded}
    for half in ("retriever", "generator"):
        section = getattr(cfg, half)
        if section.tokenizer_place is not None:
            places[f"{half}.tokenizer"] = section.tokenizer_place
            keys.pop(f"{half}.tokenizer_vocab")
    places = {name: absolute(place) for name, place in places.items() if place is not None}
    if made is not None:
        known = {name: value for name, value in made.inputs.items() if places.get(name) == made.places.get(name)}
        return Recipe(folder, keys, {n: digest(p) for n, p in places.items() if n not in known} | known, places)
    inputs = {name: digest(place) for name, place in places.items()}
    if embedded:
        inputs["the embedded world"] = digest(world.__file__)
    for library in ("tokenizers", "transformers"):
        inputs[f"the library {library}"] = metadata.version(library)
    return Recipe(folder, keys, inputs, places)


def _text_keys(cfg: Config) -> dict[str, Any]:
    """Keys that decide how text becomes tokens."""
    return _keys("retriever", cfg.retriever, leave=TEXT_ONLY) | _keys("generator", cfg.generator, leave=TEXT_ONLY)


def model_recipe(cfg: Config, fingerprints: Mapping[str, str], half: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys and inputs that decide the shape, the tokens and the first weights of ``retriever`` or ``generator``."""
    section = getattr(cfg, half)
    keys = {"seed": cfg.seed, **_keys(half, section, leave=NOT_SHAPE)}
    inputs = {f"{half} tokenizer": fingerprints[f"{half}_tokenizer"]}
    if section.source != "scratch":
        inputs[f"{half}.source"] = digest(section.source)
    return keys, inputs


def phase_recipe(cfg: Config, fingerprints: Mapping[str, str], phase: Phase, earlier: Mapping[str, str]) -> Recipe:
    """The weights of a phase, its tables and checkpoints.

    Args:
      fingerprints: of the prepared data, see :meth:`jmlr_jax.data.batches.Prepared.card`.
      earlier: digests of the phases it starts from, by name.
    """
    train = cfg.train
    keys, inputs = model_recipe(cfg, fingerprints, "generator")
    used = ["batch_size", "accumulate"]
    if phase.name == "warmup":
        used += ["warmup"]
    else:
        used += ["steps"] + ["generator"] * phase.read + ["read_passages"] * (phase.passages != "none")
    if phase.rank:
        used += RANKING + ("judge_decay",) * phase.read + ("judge_int8",) * train.judge_int8
    if phase.passages == "live":
        used += LIVE
    if cfg.eval.checkpoint == "best":
        used += ["checkpoint_steps", "dev_questions"]
        keys["eval.checkpoint"] = "best"
    keys |= {key: value for name in used for key, value in _keys("train", train, only=name).items()}
    if phase.passages in ("live", "retriever"):
        more_keys, more_inputs = model_recipe(cfg, fingerprints, "retriever")
        keys |= more_keys | index_keys(cfg)
        inputs |= more_inputs
    inputs["train questions"] = fingerprints["train"]
    if train.dev_questions:
        inputs["dev questions"] = fingerprints["dev"]
    if phase.passages != "none":
        inputs["passages"] = fingerprints["passages"]
    inputs |= {f"arms/{name}": made for name, made in earlier.items()}
    return Recipe(Path(cfg.run_dir).absolute() / "arms" / phase.name, keys, inputs)


def index_keys(cfg: Config) -> dict[str, Any]:
    """Keys that shape an index of a given retriever and corpus."""
    keys = _keys("index", cfg.index, leave=("encode_batch",))
    return {"seed": cfg.seed, "train.candidates": cfg.train.candidates, **keys}


def index_recipe(cfg: Config, fingerprints: Mapping[str, str], folder: Path, retriever: str) -> Recipe:
    """An index, or a shard of one; `retriever` is the fingerprint of its weights."""
    inputs = {"passages": fingerprints["passages"], "train questions": fingerprints["train"]}
    return Recipe(folder, index_keys(cfg), inputs | {"retriever weights": retriever})


def evaluation_recipe(
    cfg: Config, fingerprints: Mapping[str, str], split: str, arm: str, weights: Mapping[str, str]
) -> Recipe:
    """How an arm answers a split; `weights` are digests of the phases it uses, by name."""
    phase = PHASES[arm]
    keys = {f"eval.{name}": getattr(cfg.eval, name) for name in ("max_questions", "bootstrap")}
    keys |= {"seed": cfg.seed, "generator.max_length": cfg.generator.max_length}
    keys |= {"eval.conditions": list(cfg.eval.conditions), "eval.permutations": cfg.eval.permutations}
    inputs = {f"{split} questions": fingerprints[split]} | {f"arms/{name}": made for name, made in weights.items()}
    if phase.passages != "none":
        keys |= _ranking_keys(cfg)
        keys["eval.judge_passages"] = cfg.eval.judge_passages
    if phase.passages != "none" or cfg.eval.conditions:
        keys["train.read_passages"] = cfg.train.read_passages
        inputs["passages"] = fingerprints["passages"]
    if phase.passages in ("live", "retriever"):
        keys |= index_keys(cfg)
        if cfg.eval.judge_passages:  # of the retriever before training too
            more_keys, more_inputs = model_recipe(cfg, fingerprints, "retriever")
            keys, inputs = keys | more_keys, inputs | more_inputs
    return Recipe(_evaluations(cfg) / split / arm, keys, inputs)


def questions_recipe(cfg: Config, fingerprints: Mapping[str, str], suite: str, path: str, content: str) -> Recipe:
    """A published set of questions in the tokens of a run; `path` is its file, `content` the digest of that."""
    keys = {**_text_keys(cfg), "data.passage_words": cfg.data.passage_words}
    inputs = {"questions": content, "train questions": fingerprints["train"]}
    inputs |= {f"{half} tokenizer": fingerprints[f"{half}_tokenizer"] for half in ("retriever", "generator")}
    return Recipe(_evaluations(cfg) / suite / "data", keys, inputs, {"questions": absolute(path)})


def suite_recipe(
    cfg: Config, fingerprints: Mapping[str, str], arm: str, weights: Mapping[str, str], questions: Recipe
) -> Recipe:
    """How an arm answers a published set; `questions` is of :func:`questions_recipe`."""
    phase, folder = PHASES[arm], questions.folder.parent
    keys = {f"eval.{name}": getattr(cfg.eval, name) for name in ("max_questions", "bootstrap")}
    keys |= {"seed": cfg.seed, "generator.max_length": cfg.generator.max_length}
    inputs = {f"{folder.name} questions": questions.digest}
    inputs |= {f"arms/{name}": made for name, made in weights.items()}
    if phase.passages != "none":
        inputs["passages"] = fingerprints["passages"]
    if phase.passages in ("live", "retriever"):
        keys |= index_keys(cfg)
    return Recipe(folder / arm, keys, inputs)


def retrieval_recipe(cfg: Config, fingerprints: Mapping[str, str], split: str, name: str) -> Recipe:
    """How the retriever ranks a split before any training."""
    more, inputs = model_recipe(cfg, fingerprints, "retriever")
    keys = {**more, **index_keys(cfg), **_ranking_keys(cfg)}
    inputs |= {f"{split} questions": fingerprints[split], "passages": fingerprints["passages"]}
    return Recipe(_evaluations(cfg) / split / name, keys, inputs)


def _ranking_keys(cfg: Config) -> dict[str, Any]:
    return {"eval.hit_at": list(cfg.eval.hit_at)}


def _evaluations(cfg: Config) -> Path:
    return Path(cfg.run_dir).absolute() / "eval"


def _keys(prefix: str, section: BaseModel, *, leave: tuple[str, ...] = (), only: str | None = None) -> dict[str, Any]:
    """Leaves of a section by dotted key, JSON values; `leave` and `only` are keys or sections below `prefix`."""
    found: dict[str, Any] = {}

    def walk(key: str, value: Any) -> None:
        below = key.removeprefix(f"{prefix}.")
        if any(below == name or below.startswith(f"{name}.") for name in leave):
            return
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{key}.{name}", inner)
        elif only is None or below == only or below.startswith(f"{only}."):
            found[key] = value

    walk(prefix, section.model_dump(mode="json"))
    return found
