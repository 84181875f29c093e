"""Every configuration key is read by what it steers: reads are traced while small runs go through every stage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import _lru_cache_wrapper, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from pydantic import BaseModel
from runs import one_device, tiny_config

from jmlr_jax import config as schema
from jmlr_jax.commands import pipeline
from jmlr_jax.config import Config
from jmlr_jax.config_models import BertConfig, GeneratorConfig, LlamaConfig, RopeScalingConfig, Strict
from jmlr_jax.data.chat import layout
from jmlr_jax.data.sources import read_sources
from jmlr_jax.data.tokenizers import TokenizerError, generator_ids, load_tokenizer, train_generator_tokenizer
from jmlr_jax.nn.functional import abstract_params, bert_hidden, llama_hidden
from jmlr_jax.planning.plan import make_plan
from jmlr_jax.planning.programs import PlanError

Read = tuple[str, str]  # class of a section, name of a field


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Read]]:
    """Yields (dotted key, class and field that hold it), sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", (model.__name__, name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, f"{prefix}{name}.")


pytestmark = pytest.mark.exhaustive  # what is read is found by running everything


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> set[Read]:
    """Fields that were read as attributes outside the schema itself."""
    found: set[Read] = set()
    plain = object.__getattribute__

    def traced(self: Strict, name: str) -> Any:
        if name in type(self).model_fields:
            # A field of a base class counts for the class it was asked of.
            found.add((type(self).__name__, name))
        return plain(self, name)

    _forget()
    configured = {name: tiny_config(tmp_path_factory.mktemp(name)) for name in ("whole", "adapters")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        one_device(monkeypatch)
        monkeypatch.setattr(Strict, "__getattribute__", traced, raising=False)
        _whole(configured["whole"])
        _adapters(configured["adapters"])
        _shapes()
        _chat(tmp_path_factory.mktemp("chat"))
        _files(tmp_path_factory.mktemp("files"))
        with pytest.raises(PlanError, match="nowhere"):
            make_plan(Config(mesh=schema.MeshConfig(topology="nowhere:2x2")), None)
    return found


def _forget() -> None:
    """Empties the caches of programs and shapes: what an earlier test made of equal sections is not read again."""
    jax.clear_caches()
    for cached in [found for found in gc.get_objects() if isinstance(found, _lru_cache_wrapper)]:
        if (cached.__module__ or "").startswith("jmlr_jax"):
            cached.cache_clear()


def _changed(cfg: Config, **sections: dict[str, Any]) -> Config:
    tree = cfg.model_dump()
    for name, values in sections.items():
        tree[name] |= values
    return Config.model_validate(tree)


SHORT = {"steps": 3, "checkpoint_steps": 3, "refresh_steps": 2, "refresh_delay": 1}


def _whole(cfg: Config) -> None:
    """Every stage with weights that train whole, and the index that is tuned."""
    train = SHORT | {"warmup": cfg.train.warmup.model_copy(update={"steps": 1}).model_dump()}
    index = {"kind": "scann"}
    pipeline.run_all(_changed(cfg, train=train, index=index, eval={"arms": ["jmlr", "frozen"]}), seeds=1)


def _adapters(cfg: Config) -> None:
    """One phase that trains adapters on both halves."""
    encoder, decoder = {"lora": {"rank": 2}}, {"lora": {"rank": 2, "targets": ["q", "up"]}}
    pipeline.run_all(_changed(cfg, train=SHORT, retriever=encoder, generator=decoder, eval={"arms": ["jmlr"]}), seeds=1)


def _shapes() -> None:
    """What only some decoders have, by shape alone."""
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        scaling = RopeScalingConfig(type=kind, factor=2.0, original_max_positions=8)
        kinds = {
            "sliding_window": 4,
            "layer_kinds": ("window", "full"),
            "window_rope_theta": 9.0,
            "rope_scaling": scaling,
        }
        llama = LlamaConfig(vocab_size=8, qkv_bias=True, qk_norm=True, block="gemma", query_pre_attn_scalar=3, **kinds)
        tokens, length = jax.ShapeDtypeStruct((1, 16), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        jax.eval_shape(partial(llama_hidden, cfg=llama), abstract_params(llama), tokens_BxT=tokens, length_B=length)
        bert = BertConfig(vocab_size=8, block="modernbert", num_layers=2, **kinds)
        jax.eval_shape(partial(bert_hidden, cfg=bert), abstract_params(bert), ids_BxT=tokens, length_B=length)


def _chat(folder: Any) -> None:
    """A prompt through a template that a tokenizer here has none of."""
    train_generator_tokenizer(["abc"], 300, str(folder))
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(TokenizerError, match="no chat template"):
        layout(generator_ids(tokenizer), tokenizer, GeneratorConfig(chat=True, system="a"))


def _files(folder: Any) -> None:
    """Questions and passages of files, whose paths a run on the embedded world does not read."""
    question = '{"id": "q", "question": "What?", "options": {"A": "this", "B": "that"}, "answer": "A"}\n'
    (folder / "q.jsonl").write_text(question)
    (folder / "p.jsonl").write_text('{"id": "p", "title": "", "text": "a passage"}\n')
    paths = {"train_path": str(folder / "q.jsonl"), "corpus_path": str(folder / "p.jsonl")}
    read_sources(Config(data=schema.DataConfig(questions="jsonl", **paths)))


@pytest.mark.parametrize(("key", "read"), sorted(_fields(Config)), ids=[key for key, _ in sorted(_fields(Config))])
def test_field_is_read(reads: set[Read], key: str, read: Read) -> None:
    assert read in reads, f"{key}: nothing in jmlr_jax reads it; use it or remove it"


def test_a_field_that_nobody_reads_is_found(reads: set[Read]) -> None:
    assert ("TrainConfig", "name that is no field") not in reads and ("TrainConfig", "steps") in reads
