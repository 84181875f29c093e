"""Exported decoders: what transformers and PEFT make of them, and import -> export -> import as the identity."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath
from safetensors import safe_open

from jmlr_jax.config import MeshConfig
from jmlr_jax.config_models import LlamaConfig, LoraConfig
from jmlr_jax.data.tokenizers import generator_ids, load_tokenizer, train_generator_tokenizer
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.export import Lora, write_adapters, write_generator
from jmlr_jax.hf.io import HFError, read_directory
from jmlr_jax.hf.load import load_generator
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.generate import generate
from jmlr_jax.nn.lora import abstract_lora, bind
from jmlr_jax.parallel.sharding import make_mesh

ASKED = LlamaConfig(max_positions=16)
VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_generator_tokenizer(["the kidney hardens", "what hardens the kidney"], VOCAB, str(folder))
    return str(folder)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory as it lies on disk."""
    return {key: (e.dtype, e.shape, e.read().tobytes()) for key, e in read_directory(folder).items()}


def out(folder: Path) -> epath.Path:
    folder.mkdir()
    return epath.Path(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["llama", "llama, tied, own head width", "mistral, no window", "qwen2, window, yarn", "qwen3", "gemma3"]
)
def test_round_trip_is_the_identity(name: str, dtype: str, tmp_path: Path, tokenizer: str) -> None:
    """On a mesh, in several files, without adapters: the bytes of every tensor and the fields of config.json."""
    source, written = tmp_path / "source", tmp_path / "written"
    hf_models.decoder(name, source, getattr(torch, dtype))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if dtype == "bfloat16" else None
    asked = ASKED.model_copy(update={"param_dtype": dtype} | ({"vocab_size": 61} if mesh is None else {}))
    if mesh is not None:
        asked = asked.model_copy(update={"vocab_size": 62})  # 61 rows do not divide
    cfg, params = load_generator(str(source), asked, mesh)
    raw = json.loads((source / "config.json").read_text())
    ids = generator_ids(load_tokenizer(tokenizer))
    write_generator(out(written), cfg, params, ids, tokenizer, like=raw, shard_bytes=9000)
    assert len(list(written.glob("*.safetensors"))) > 2
    if mesh is None:
        assert stored(written) == stored(source)
        assert json.loads((written / "config.json").read_text()) == raw
    again, back = load_generator(str(written), asked)
    assert again == cfg
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, back)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path, tokenizer: str) -> None:
    """20 prompts of unequal length, adapters merged into what is written and bound in what is computed here."""
    source, written = tmp_path / "source", tmp_path / "written"
    hf_models.decoder(name, source, vocab_size=VOCAB)
    cfg, params = load_generator(str(source), ASKED)
    lora = adapters(cfg)
    ids = generator_ids(load_tokenizer(tokenizer))
    write_generator(out(written), cfg, params, ids, tokenizer, lora=lora, max_new=8)

    rng = np.random.default_rng(1)
    length_B = rng.integers(1, 9, 20)
    prompt_BxT = rng.integers(3, VOCAB, (20, 8))
    tokens, made = generate(
        params,
        cfg,
        jnp.asarray(prompt_BxT),
        jnp.asarray(length_B),
        max_new=8,
        eos_id=ids.eos,
        adapters=bind(lora.tree, lora.cfg),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(written, attn_implementation="eager").eval()
    assert len(transformers.AutoTokenizer.from_pretrained(written)) <= VOCAB
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (ids.eos, 8)
    for row, n in enumerate(length_B):
        prompt = torch.tensor(prompt_BxT[row : row + 1, :n])
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, n:].tolist()
        assert tokens[row, : made[row]].tolist() == theirs


def adapters(cfg: LlamaConfig) -> Lora:
    """Random adapters, b included, so that they change the result."""
    targets = ("q", "k", "v", "o", "gate", "up", "down") + (() if cfg.tie_embeddings else ("lm_head",))
    lora_cfg = LoraConfig(rank=3, alpha=12.0, targets=targets)
    rng = np.random.default_rng(2)
    shapes = abstract_lora(lora_cfg, cfg)
    return Lora(lora_cfg, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_adapters_in_peft(name: str, tmp_path: Path, tokenizer: str) -> None:
    """PEFT on the base it was trained on, our adapters bound, and the merged export: the same logits."""
    source, merged, alone = tmp_path / "source", tmp_path / "merged", tmp_path / "adapters"
    base = hf_models.decoder(name, source)
    tokens = np.random.default_rng(0).integers(0, hf_models.VOCAB, (2, 10))
    with torch.no_grad():
        plain = base(torch.tensor(tokens)).logits.numpy()
    cfg, params = load_generator(str(source), ASKED.model_copy(update={"vocab_size": 64}))  # padded
    lora = adapters(cfg)
    ids = generator_ids(load_tokenizer(tokenizer))
    write_generator(out(merged), cfg, params, ids, tokenizer, lora=lora)
    write_adapters(out(alone), cfg, lora, str(source), base_vocab=hf_models.VOCAB, tokenizer=tokenizer)

    hidden = F.llama_hidden(params, cfg, tokens, np.full(2, 10), adapters=bind(lora.tree, lora.cfg))
    ours = np.asarray(F.llama_logits(params, cfg, hidden, adapters=bind(lora.tree, lora.cfg)))[..., : hf_models.VOCAB]
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(base, alone)
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
        model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        from_merged = model(torch.tensor(tokens)).logits.numpy()[..., : hf_models.VOCAB]
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(from_merged, theirs, atol=1e-4)
    described = json.loads((alone / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(source) and described["lora_alpha"] == 12
    # What vLLM asks of an adapter: these fields, low-rank matrices and nothing else.
    assert {"r", "lora_alpha", "target_modules"} <= described.keys()
    assert not described.keys() & {"modules_to_save", "use_dora"}
    with safe_open(alone / "adapter_model.safetensors", "numpy") as file:
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in file.keys())


def published(folder: Path, tokenizer: str, dtype: torch.dtype = torch.float32) -> None:
    """A decoder with its tokenizer, in several files."""
    hf_models.decoder("qwen3", folder, dtype, vocab_size=VOCAB, max_shard_size="20KB")
    load_tokenizer(tokenizer).save_pretrained(folder)


def test_import_keeps_every_byte(tmp_path: Path, tokenizer: str) -> None:
    source, written = tmp_path / "source", tmp_path / "written"
    published(source, tokenizer, torch.bfloat16)
    (source / "tokenizer.model").write_bytes(b"pieces")
    import_checkpoint(source, written)
    assert (written / "tokenizer.model").read_bytes() == b"pieces"
    assert stored(written) == stored(source)
    assert json.loads((written / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert load_tokenizer(str(written)).get_vocab() == load_tokenizer(tokenizer).get_vocab()


def test_import_adds_tokens_and_rows(tmp_path: Path, tokenizer: str) -> None:
    """Two tokens, which have unused rows of the checkpoint; rows up to a multiple of 128; another dtype."""
    source, written = tmp_path / "source", tmp_path / "written"
    published(source, tokenizer)
    known = len(load_tokenizer(tokenizer))
    assert known < VOCAB - 2
    import_checkpoint(source, written, dtype="bfloat16", vocab_multiple=128, add_tokens=["<a>", "<b>"])
    added = load_tokenizer(str(written))
    assert [added.get_vocab()[token] for token in ("<a>", "<b>")] == [known, known + 1]
    before, after = read_directory(source), read_directory(written)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before[key].read(), after[key].read().astype(np.float32)
        kept = np.ones(VOCAB, bool)
        kept[known : known + 2] = False
        assert new.shape == (384, 32)
        np.testing.assert_array_equal(new[:VOCAB][kept], old[kept].astype(jnp.bfloat16))
        fresh = np.concatenate([new[known : known + 2], new[VOCAB:]])
        np.testing.assert_allclose(fresh, np.broadcast_to(old[kept].mean(0), fresh.shape), rtol=0.01)
    cfg, _ = load_generator(str(written), ASKED)
    assert cfg.vocab_size == 384
    with pytest.raises(HFError, match="has <a> already"):
        import_checkpoint(written, tmp_path / "third", add_tokens=["<a>"])


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_import_of_the_first_layers(name: str, tmp_path: Path, tokenizer: str) -> None:
    """The hidden state after so many layers of the whole model, through the final norm; kinds of layers are cut too."""
    source, written = tmp_path / "source", tmp_path / "written"
    model = hf_models.decoder(name, source, vocab_size=VOCAB)
    load_tokenizer(tokenizer).save_pretrained(source)
    import_checkpoint(source, written, layers=1)
    cfg, params = load_generator(str(written), ASKED)
    assert cfg.num_layers == 1 < model.config.num_hidden_layers
    tokens = np.arange(3, 13)[None]
    ours = F.llama_hidden(params, cfg, jnp.asarray(tokens), jnp.array([tokens.shape[1]]))
    with torch.no_grad():
        states = model(torch.tensor(tokens), output_hidden_states=True).hidden_states
        theirs = model.model.norm(states[1]).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    with pytest.raises(HFError, match=f"there are {model.config.num_hidden_layers} layers"):
        import_checkpoint(source, tmp_path / "more", layers=model.config.num_hidden_layers + 1)


def test_import_that_fails_leaves_nothing(tmp_path: Path, tokenizer: str) -> None:
    source, written = tmp_path / "source", tmp_path / "written"
    model = hf_models.decoder("qwen3", tmp_path / "source", vocab_size=VOCAB)
    load_tokenizer(tokenizer).save_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e30
    model.save_pretrained(source)
    with pytest.raises(HFError, match=r"as float16 in model.layers.1.mlp.up_proj.weight"):
        import_checkpoint(source, written, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_decoder_within_a_model_that_sees_images(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture
) -> None:
    """Its text is computed, the rest left out and told; exported alone, and as adapters for the model it came from."""
    source, alone, merged = tmp_path / "source", tmp_path / "adapters", tmp_path / "merged"
    model = hf_models.nested(source)
    cfg, params = load_generator(str(source), ASKED)
    assert "tensors that see images (multi_modal_projector.*, vision_tower.*)" in capsys.readouterr().err
    tokens = np.random.default_rng(0).integers(6, hf_models.VOCAB, (2, 12))

    def logits(lora: Lora | None) -> np.ndarray:
        bound = None if lora is None else bind(lora.tree, lora.cfg)
        hidden = F.llama_hidden(params, cfg, tokens, np.full(2, 12), adapters=bound)
        return np.asarray(F.llama_logits(params, cfg, hidden))

    with torch.no_grad():
        np.testing.assert_allclose(logits(None), model(torch.tensor(tokens)).logits.numpy(), atol=1e-4)
    lora, ids = adapters(cfg), generator_ids(load_tokenizer(tokenizer))
    write_adapters(out(alone), cfg, lora, str(source), hf_models.VOCAB, tokenizer, nested=True)
    raw = json.loads((source / "config.json").read_text())
    write_generator(out(merged), cfg, params, ids, tokenizer, lora=lora, like=raw)
    text = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    assert isinstance(text, transformers.Gemma3ForCausalLM)
    adapted = peft.PeftModel.from_pretrained(model, alone)
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "vision" in name]
    with torch.no_grad():
        for each in (text, adapted):
            np.testing.assert_allclose(each(torch.tensor(tokens)).logits.numpy(), logits(lora), atol=1e-4)
    assert np.abs(logits(lora) - logits(None)).max() > 0.1
