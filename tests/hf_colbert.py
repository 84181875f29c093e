"""A small retriever with a tokenizer, the same in every environment, the texts it is tried on, and what this project,
sentence-transformers and colbert-ai make of them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from etils import epath
from sentence_transformers import MultiVectorEncoder

from jmlr_jax.config_models import BertConfig, RetrieverConfig
from jmlr_jax.data.tokenise import tokenise
from jmlr_jax.data.tokenizers import (
    encoder,
    load_tokenizer,
    punctuation_table,
    retriever_ids,
    train_retriever_tokenizer,
)
from jmlr_jax.hf.export import write_colbert, write_pylate
from jmlr_jax.method.scoring import maxsim
from jmlr_jax.nn import functional as F

QUERIES = [
    "what hardens the kidney?",
    "Which drug, given early, slows the loss of renal function in diabetic patients with protein in the urine?",
    "liver",
    "",
]
PASSAGES = [
    "Nephrosclerosis. Hardening of the renal arteries (arteriosclerosis); the kidney shrinks.",
    "Hepatitis: inflammation of the liver - often viral!",
    "In diabetic nephropathy an inhibitor of the enzyme, given early, slows the loss of renal function, lowers "
    "the pressure in the glomerulus, and reduces the protein in the urine by a third or more within the first year.",
    "...",
]
LONG = {"query_length": 20, "passage_length": 32, "dim": 12, "tokenizer_vocab": 400}
BERT = BertConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_positions=48)
MODERN = BertConfig(
    **BERT.model_dump(include={"hidden_size", "intermediate_size", "num_heads", "max_positions"}), block="modernbert",
    num_layers=4, layer_norm_eps=1e-5, sliding_window=6, layer_kinds=("full", "window", "window"),
    rope_theta=160_000.0, window_rope_theta=10_000.0,
)  # fmt: skip
CONFIGS = {
    "published": RetrieverConfig(bert=BERT, query_marker="[unused0]", passage_marker="[unused1]", **LONG),
    "weighted": RetrieverConfig(bert=BERT, importance=True, **LONG),
    "own": RetrieverConfig(bert=BERT, attend_to_mask_tokens=True, skip_punctuation=False, **LONG),
    "plain": RetrieverConfig(bert=BERT, augment_queries=False, **LONG),
    "modern": RetrieverConfig(bert=MODERN, augment_queries=False, **LONG),
    "attended": RetrieverConfig(bert=MODERN, attend_to_mask_tokens=True, **LONG),
}


def retriever(name: str, folder: Path) -> tuple[RetrieverConfig, Any, str]:
    """Configuration with its vocabulary, random parameters, and the directory of the tokenizer."""
    cfg = CONFIGS[name]
    tokenizer = str(folder / "tokenizer")
    letters = " ".join(string.ascii_lowercase)
    train_retriever_tokenizer([*QUERIES, *PASSAGES, letters, string.punctuation], cfg, tokenizer)
    size = retriever_ids(load_tokenizer(tokenizer), cfg).vocab_size
    cfg = cfg.model_copy(update={"bert": cfg.bert.model_copy(update={"vocab_size": size})})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), F.abstract_params(cfg))
    return cfg, params, tokenizer


def export(name: str, folder: Path) -> tuple[RetrieverConfig, Any, str]:
    """Writes a retriever in both layouts; what is returned is as in :func:`retriever`."""
    cfg, params, tokenizer = retriever(name, folder)
    for kind, write in (("colbert", write_colbert), ("pylate", write_pylate)):
        if kind == "colbert" and not cfg.augment_queries:
            continue  # has no form there
        (folder / kind).mkdir()
        write(epath.Path(folder / kind), cfg, params, tokenizer)
    return cfg, params, tokenizer


def tokens(cfg: RetrieverConfig, tokenizer: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ids and lengths of the texts, by the functions that training and retrieval use; the table of punctuation."""
    loaded = load_tokenizer(tokenizer)
    ids = retriever_ids(loaded, cfg)
    found = {}
    for side, texts, limit in (("query", QUERIES, cfg.query_length), ("passage", PASSAGES, cfg.passage_length)):
        before, after = ids.around(side)
        table, _ = tokenise(encoder(loaded), texts, limit, side, before=before, after=after)
        filler = ids.mask if side == "query" and cfg.augment_queries else ids.pad
        found[f"{side}_ids"], found[f"{side}_len"] = table.padded(np.arange(len(texts)), limit, filler)
    return found, punctuation_table(loaded, cfg.bert.vocab_size, skip=cfg.skip_punctuation)


def vectors(
    params: Any, cfg: RetrieverConfig, found: dict[str, np.ndarray], skip_V: np.ndarray
) -> dict[str, jax.Array]:
    """Vectors, masks and scores [queries, passages] of what :func:`tokens` found."""
    q = F.encode_queries(params, cfg, found["query_ids"], found["query_len"])
    p, keep = F.encode_passages(params, cfg, found["passage_ids"], found["passage_len"], jnp.asarray(skip_V))
    n = len(q)
    scores = maxsim(q, jnp.broadcast_to(p, (n, *p.shape)), jnp.broadcast_to(keep, (n, *keep.shape)))
    return {"q": q, "p": p, "keep": keep, "scores": scores}


def encode(cfg: RetrieverConfig, params: Any, tokenizer: str) -> dict[str, np.ndarray]:
    """Ids, lengths, vectors, masks and scores of the texts."""
    found, skip_V = tokens(cfg, tokenizer)
    return found | {name: np.asarray(value) for name, value in vectors(params, cfg, found, skip_V).items()}


class HFColBERT(transformers.BertPreTrainedModel):
    """colbert-ai's model class: a BertModel under ``bert`` and a linear map without bias."""

    def __init__(self, config: Any, dim: int) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.linear = torch.nn.Linear(config.hidden_size, dim, bias=False)
        self.post_init()


def colbert_ai(folder: Path) -> tuple[HFColBERT, torch.Tensor]:
    """The model of a directory, and scores [queries, passages] as colbert-ai computes them: its tokenisers, masks and
    normalisation, written out."""
    card = json.loads((folder / "artifact.metadata").read_text())
    model = HFColBERT.from_pretrained(folder, dim=card["dim"]).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)

    def encoded(texts: list[str], marker: str, length: int, query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        padding = "max_length" if query else "longest"
        got = tok(texts, padding=padding, truncation=True, max_length=length - 1, return_tensors="pt")
        number = torch.full((len(texts), 1), tok.convert_tokens_to_ids(marker))
        ids = torch.cat([got["input_ids"][:, :1], number, got["input_ids"][:, 1:]], 1)
        mask = torch.cat([torch.ones_like(number), got["attention_mask"]], 1)
        if query:
            ids[ids == tok.pad_token_id] = tok.mask_token_id
            if card["attend_to_mask_tokens"]:
                mask = torch.ones_like(mask)
        marks = string.punctuation if card["mask_punctuation"] and not query else ""
        skipped = torch.tensor([tok.encode(mark, add_special_tokens=False)[0] for mark in marks] + [tok.pad_token_id])
        kept = ~torch.isin(ids, skipped)
        x = model.linear(model.bert(ids, attention_mask=mask)[0]) * kept[..., None]
        return torch.nn.functional.normalize(x, p=2, dim=2), kept

    q, _ = encoded(QUERIES, card["query_token_id"], card["query_maxlen"], True)
    p, kept = encoded(PASSAGES, card["doc_token_id"], card["doc_maxlen"], False)
    pairs = torch.einsum("nqc,kpc->nkqp", q, p)
    return model, pairs.masked_fill(~kept[None, :, None], -9999).max(-1).values.sum(-1)


def multi_vector(folder: Path) -> dict[str, Any]:
    """What sentence-transformers makes of a directory, by the names of :func:`encode`: for each text ids, attention
    mask and the vectors it keeps, and scores [queries, passages]."""
    model, found = MultiVectorEncoder(str(folder), device="cpu"), {}
    for side, task, texts in (("query", "query", QUERIES), ("passage", "document", PASSAGES)):
        given = [model.preprocess([text], prompt=model.prompts[task], task=task) for text in texts]
        found[f"{side}_ids"] = [row["input_ids"][0].tolist() for row in given]
        found[f"{side}_mask"] = [row["attention_mask"][0].tolist() for row in given]
    found["q"], found["p"] = model.encode_query(QUERIES), model.encode_document(PASSAGES)
    found["scores"] = model.similarity(found["q"], found["p"]).numpy()
    return found
