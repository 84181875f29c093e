"""Key tables of the retriever: BertModel or ModernBertModel, and ColBERT's linear map after it."""

from __future__ import annotations

from dataclasses import replace

from jmlr_jax.config_models import BertConfig
from jmlr_jax.hf.table import Row

PROJECTION = "linear.weight"
IMPORTANCE = "importance"  # of query tokens: in a file of its own, which other libraries do not read
POSITION_IDS = "embeddings.position_ids"
_LAYER = "encoder.layer.{}."
# Under which name a class around the trunk holds it.
PREFIX = {"bert": "bert.", "modernbert": "model."}
# Heads of pre-training and the pooled [CLS] vector: late interaction reads neither.
_UNUSED = ("pooler.dense.", "cls.predictions.", "cls.seq_relationship.", "head.dense.", "head.norm.", "decoder.")


def bert_rows(cfg: BertConfig) -> tuple[Row, ...]:
    """One row for each leaf of ``init_bert(cfg, ...)``; keys as in BertModel or ModernBertModel."""
    return _modern_rows(cfg) if cfg.block == "modernbert" else _bert_rows()


def _modern_rows(cfg: BertConfig) -> tuple[Row, ...]:
    rows = [
        Row("word", "embeddings.tok_embeddings.weight", "v d -> v d"),
        Row("embed_norm", "embeddings.norm.weight", "d -> d"),
        Row("final_norm", "final_norm.weight", "d -> d"),
        Row("layers.qkv", "layers.{}.attn.Wqkv.weight", "(p h e) d -> d p h e"),
        Row("layers.o", "layers.{}.attn.Wo.weight", "d (h e) -> h e d"),
        Row("layers.mlp_norm", "layers.{}.mlp_norm.weight", "d -> d"),
        Row("layers.up", "layers.{}.mlp.Wi.weight", "(p f) d -> d p f"),
        Row("layers.down", "layers.{}.mlp.Wo.weight", "d f -> f d"),
    ]
    if cfg.num_layers > 1:
        rows.append(Row("attn_norm", "layers.{}.attn_norm.weight", "d -> d", first=1))
    return tuple(rows)


def _bert_rows() -> tuple[Row, ...]:
    rows = [
        Row("word", "embeddings.word_embeddings.weight", "v d -> v d"),
        Row("position", "embeddings.position_embeddings.weight", "p d -> p d"),
        Row("token_type", "embeddings.token_type_embeddings.weight", "t d -> t d"),
        Row("layers.o", _LAYER + "attention.output.dense.weight", "d (h e) -> h e d"),
        Row("layers.o_bias", _LAYER + "attention.output.dense.bias", "d -> d"),
        Row("layers.up", _LAYER + "intermediate.dense.weight", "f d -> d f"),
        Row("layers.up_bias", _LAYER + "intermediate.dense.bias", "f -> f"),
        Row("layers.down", _LAYER + "output.dense.weight", "d f -> f d"),
        Row("layers.down_bias", _LAYER + "output.dense.bias", "d -> d"),
    ]
    for name, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        rows.append(Row(f"layers.{name}", f"{_LAYER}attention.self.{theirs}.weight", "(h e) d -> d h e"))
        rows.append(Row(f"layers.{name}_bias", f"{_LAYER}attention.self.{theirs}.bias", "(h e) -> h e"))
    for name, theirs in (
        ("embed_norm", "embeddings."),
        ("layers.attn_norm", _LAYER + "attention.output."),
        ("layers.mlp_norm", _LAYER + "output."),
    ):
        rows.append(Row(name, f"{theirs}LayerNorm.weight", "d -> d"))
        rows.append(Row(f"{name}_bias", f"{theirs}LayerNorm.bias", "d -> d"))
    return tuple(rows)


def colbert_rows(cfg: BertConfig, *, projection: bool = True, importance: bool = False) -> tuple[Row, ...]:
    """One row for each leaf of ``init_colbert(...)``; the keys that :func:`canonical` gives."""
    trunk = [replace(row, path=f"bert.{row.path}") for row in bert_rows(cfg)]
    head = [Row("projection", PROJECTION, "c d -> d c")] if projection else []
    return (*trunk, *head, *([Row("importance", IMPORTANCE, "c -> c")] if importance else []))


def canonical(key: str) -> str | None:
    """The table's name of a key, whether the trunk stands alone or in a class of its own; None if known and not needed.

    Old checkpoints call the scale and shift of a layer norm gamma and beta.
    """
    name = key.removeprefix("bert.").removeprefix("model.")
    if name == POSITION_IDS or name.startswith(_UNUSED):
        return None
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
