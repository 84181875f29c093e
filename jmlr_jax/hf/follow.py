"""What a published directory knows is taken from it: shapes, markers, conventions and lengths that were left open."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from jmlr_jax.config import Config
from jmlr_jax.config_models import BertConfig, LlamaConfig, RetrieverConfig
from jmlr_jax.files import any_path
from jmlr_jax.hf import config, encoder_config
from jmlr_jax.hf.io import HFError, read_json
from jmlr_jax.hf.layouts import check_conventions, check_source, open_retriever


def followed(cfg: Config) -> Config:
    """The configuration with what its sources say in the place of every key that was not set.

    Vocabulary sizes stay open: they depend on the tokenizer too. Without a source it is `cfg` itself.

    Raises:
      HFError: a source cannot be read, or a key that was set says otherwise than it.
    """
    tree: dict[str, Any] = {}
    if cfg.generator.source != "scratch":
        tree["generator"] = cfg.generator.model_copy(update={"llama": _generator(cfg)})
    if cfg.retriever.source != "scratch":
        tree["retriever"] = _retriever(cfg.retriever)
    if not tree:
        return cfg
    made = cfg.model_copy(update=tree)
    try:
        Config.model_validate(made.model_dump())  # checks across keys, now that all are known
    except ValidationError as error:
        lines = [problem["msg"].removeprefix("Value error, ") for problem in error.errors(include_url=False)]
        sources = ", ".join(f"{half}.source={getattr(cfg, half).source}" for half in tree)
        raise HFError("\n".join(f"{sources}: {line}" for line in lines)) from None
    return made


def _generator(cfg: Config) -> LlamaConfig:
    source, asked = cfg.generator.source, cfg.generator.llama
    check_source(source)
    found = config.llama_from_hf(read_json(any_path(source) / "config.json"), f"{source}/config.json")
    shape = config.resolve(found, asked, 0, "generator.llama", source)
    return shape.model_copy(update={"vocab_size": asked.vocab_size})


def _retriever(asked: RetrieverConfig) -> RetrieverConfig:
    opened = open_retriever(asked.source)
    found = encoder_config.bert_from_hf(opened.config, f"{asked.source}/config.json")
    bert: BertConfig = config.resolve(found, asked.bert, 0, "retriever.bert", asked.source)
    said = {**opened.conventions, **opened.lengths} | ({} if opened.dim is None else {"dim": opened.dim})
    taken = {name: value for name, value in said.items() if name not in asked.model_fields_set}
    made = asked.model_copy(update={**taken, "bert": bert.model_copy(update={"vocab_size": asked.bert.vocab_size})})
    check_conventions(opened, made)
    return made
