"""A small retriever with a tokenizer, the same in every environment, and the texts it is tried on.

``python tests/hf_colbert.py FOLDER`` writes it as FOLDER/colbert and FOLDER/pylate with the texts, for
``benchmarks/pylate_reference.py``, which records what PyLate makes of them.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from jmlr_jax.config import BertConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import load_tokenizer, retriever_ids, train_retriever_tokenizer
from jmlr_jax.hf.export import write_colbert, write_pylate
from jmlr_jax.nn.functional import abstract_params

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
CONFIGS = {
    "published": RetrieverConfig(bert=BERT, query_marker="[unused0]", passage_marker="[unused1]", **LONG),
    "own": RetrieverConfig(bert=BERT, attend_to_mask_tokens=True, skip_punctuation=False, **LONG),
    "plain": RetrieverConfig(bert=BERT, augment_queries=False, **LONG),
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
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), abstract_params(cfg))
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


if __name__ == "__main__":
    for chosen in CONFIGS:
        target = Path(sys.argv[1]) / chosen
        target.mkdir(parents=True)
        export(chosen, target)
    (Path(sys.argv[1]) / "texts.json").write_text(json.dumps({"queries": QUERIES, "passages": PASSAGES}))
