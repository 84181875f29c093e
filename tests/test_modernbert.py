"""ModernBERT against transformers': a layer's attention, a layer, the model; both dialects of its config; as a ColBERT.

Tolerance as in ``test_hf_parity.py``. Rows are longer than the window of 4 on either side.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.numpy import save_file

from jmlr_jax.config_models import BertConfig, EncoderLoraConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import train_retriever_tokenizer
from jmlr_jax.hf.bert import bert_rows, colbert_rows
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.encoder_config import bert_from_hf, bert_to_hf
from jmlr_jax.hf.export import tensors_of, write_colbert, write_pylate
from jmlr_jax.hf.io import HFError, read_directory, read_json
from jmlr_jax.hf.layouts import open_retriever
from jmlr_jax.hf.load import load_retriever
from jmlr_jax.hf.table import leaves
from jmlr_jax.nn import functional as F
from jmlr_jax.nn.attention import attend
from jmlr_jax.nn.lora import init_lora, merge
from jmlr_jax.nn.rotary import Kinds, apply_rope

T, DIM, TOLERANCE = 20, 6, 1e-4
LENGTHS = np.array([20, 13])
IDS = np.random.default_rng(0).integers(0, hf_models.VOCAB, (2, T))
MASK = np.arange(T) < LENGTHS[:, None]
ASKED = RetrieverConfig(dim=DIM, augment_queries=False, query_length=16, passage_length=20)
bert_hidden = jax.jit(F.bert_hidden, static_argnums=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as the models here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_retriever_tokenizer(["abc"], RetrieverConfig(tokenizer_vocab=hf_models.VOCAB), str(folder))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BertConfig, Any, Path]:
    """transformers' model, our configuration and weights of the same directory, and the directory."""
    folder = tmp_path_factory.mktemp("modern")
    model = hf_models.modern(folder)
    cfg, params = load_retriever(str(folder), ASKED, jax.random.key(0))
    return model, cfg.bert, params["bert"], folder


def test_the_model(pair: tuple) -> None:
    model, cfg, params, _ = pair
    assert cfg.windows == (None, 4, 4, None, 4) and (cfg.rope_theta, cfg.window_rope_theta) == (160_000.0, 10_000.0)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).last_hidden_state.numpy()
    ours = np.asarray(bert_hidden(params, cfg, IDS, LENGTHS))
    assert np.abs(theirs[MASK]).max() > 1
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=TOLERANCE, rtol=0)
    wide = cfg.model_copy(update={"sliding_window": T})
    assert np.abs(np.asarray(bert_hidden(params, wide, IDS, LENGTHS))[MASK] - theirs[MASK]).max() > 0.1


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layers_attention(pair: tuple, layer: int) -> None:
    """Of a full layer and a windowed one, heads apart, before the output projection."""
    model, cfg, params, _ = pair
    x = np.random.default_rng(1).normal(size=(1, T, 32)).astype(np.float32)
    seen: dict[str, Any] = {}
    block = model.layers[layer].attn
    hook = block.Wo.register_forward_pre_hook(lambda _, given: seen.update(heads=given[0]))
    kind = model.config.layer_types[layer]
    with torch.no_grad():
        rope = model.rotary_emb(torch.tensor(x), torch.arange(T)[None], kind)
        near = torch.tensor(np.abs(np.arange(T) - np.arange(T)[:, None]) <= 4)[None, None]
        mask = None if layer == 0 else torch.where(near, 0.0, -1e30)
        block(torch.tensor(x), position_embeddings=rope, attention_mask=mask)
    hook.remove()
    qkv = jnp.einsum("btd,dphe->btphe", x, params["layers"]["qkv"][layer])
    kinds = Kinds.of(cfg, jnp.arange(T)[None], jnp.full((1, T), T))
    assert kinds.narrow_L is not None
    rope, said = kinds.of_layer(jnp.asarray(kinds.narrow_L[layer]))
    ours = attend(apply_rope(qkv[:, :, 0], *rope), apply_rope(qkv[:, :, 1], *rope), qkv[:, :, 2], **said)
    np.testing.assert_allclose(ours.reshape(1, T, 32), seen["heads"].numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_few_layers(count: int, tmp_path: Path) -> None:
    """One layer, which has no norm before its attention, and two."""
    model = hf_models.modern(tmp_path, num_hidden_layers=count)
    cfg, params = load_retriever(str(tmp_path), ASKED, jax.random.key(0))
    assert ("attn_norm" in params["bert"]) == (count > 1)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).last_hidden_state.numpy()
    np.testing.assert_allclose(
        bert_hidden(params["bert"], cfg.bert, IDS, np.full(2, T)), theirs, atol=TOLERANCE, rtol=0
    )


def test_gradients_and_keys(pair: tuple) -> None:
    model, cfg, params, _ = pair
    ahead = np.random.default_rng(2).normal(size=(2, T, 32)).astype(np.float32) * MASK[..., None]

    @jax.jit
    def gradient(params: Any) -> Any:
        kept = cfg.model_copy(update={"remat": "dots"})
        return jax.grad(lambda p: (F.bert_hidden(p, kept, IDS, LENGTHS) * ahead).sum())(params)

    model.zero_grad()
    out = model(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).last_hidden_state
    (out * torch.tensor(ahead)).sum().backward()
    wanted = {key: p.grad.numpy() for key, p in model.named_parameters()}
    found = {tensor.name: tensor.read() for tensor in tensors_of(bert_rows(cfg), gradient(params))}
    assert found.keys() == wanted.keys() == read_directory(pair[3]).keys()
    for key, grad in wanted.items():
        np.testing.assert_allclose(found[key], grad, atol=1e-4 * max(1, np.abs(grad).max()), rtol=1e-3, err_msg=key)


# Fields as ModernBERT-base was published, and as transformers saves it now.
OLD = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False,
    "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768,
    "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05,
    "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False,
    "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12,
    "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute", "reference_compile": None,
    "repad_logits_with_grad": False, "sep_token_id": 50282, "sparse_pred_ignore_index": -100,
    "sparse_prediction": False, "torch_dtype": "float32", "vocab_size": 50368,
}  # fmt: skip
NEW = {key: value for key, value in OLD.items() if "rope" not in key and "global" not in key} | {
    "layer_types": (["full_attention", "sliding_attention", "sliding_attention"] * 8)[:22],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def test_both_dialects() -> None:
    old, new = bert_from_hf(OLD, "f"), bert_from_hf(NEW, "f")
    assert old == new
    assert (old.block, old.sliding_window, old.layer_kinds) == ("modernbert", 64, ("full", "window", "window"))
    for raw in (OLD, NEW):
        assert bert_to_hf(old, "ModernBertForMaskedLM", raw) == raw
    assert bert_from_hf(bert_to_hf(old), "f") == old
    other = bert_from_hf(OLD | {"global_attn_every_n_layers": 2, "local_rope_theta": 5.0, "local_attention": 64}, "f")
    assert other.windows[:3] == (None, 32, None) and other.window_rope_theta == 5.0


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("attention_bias is True", {"attention_bias": True}),
        ("norm_bias is True", {"norm_bias": True}),
        ("hidden_activation is 'silu'", {"hidden_activation": "silu"}),
        ("of type 'longrope'", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}),
        ("layer_types names chunked", {"layer_types": ["chunked_attention"] * 22}),
        (
            "architectures is ModernBertForSequenceClassification",
            {"architectures": ["ModernBertForSequenceClassification"]},
        ),
        ("alibi is not known", {"alibi": True}),
    ],
)
def test_refused_by_name(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(HFError, match=message):
        bert_from_hf(OLD | change, "f")


def test_low_rank_adapters(pair: tuple) -> None:
    """On its fused projections; the default's names, which are BERT's, are refused with those there are."""
    _, cfg, params, _ = pair
    retriever = RetrieverConfig(bert=cfg, dim=DIM, augment_queries=False)
    lora = EncoderLoraConfig(rank=2, targets=("qkv", "o", "up", "down"))
    whole = {"bert": params, "projection": jnp.zeros((32, DIM))}
    tree = jax.tree.map(lambda x: x + 0.1, init_lora(lora, retriever, jax.random.key(0)))
    merged = merge(whole, tree, lora)["bert"]["layers"]["qkv"]
    change = jnp.einsum("ldr,lrphe->ldphe", tree["layers"]["qkv"]["a"], tree["layers"]["qkv"]["b"]) * 16
    np.testing.assert_allclose(merged, params["layers"]["qkv"] + change, atol=1e-4)
    with pytest.raises(ValueError, match="'q' matches no projection; there are o, up, down, qkv"):
        init_lora(EncoderLoraConfig(), retriever, jax.random.key(0))


def random_colbert(cfg: BertConfig, **conventions: Any) -> tuple[RetrieverConfig, Any]:
    asked = ASKED.model_copy(update={"bert": cfg, **conventions})
    rng = np.random.default_rng(3)
    return asked, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), F.abstract_params(asked))


@pytest.mark.parametrize("layout", ["colbert", "pylate"])
def test_round_trip_of_both_layouts(pair: tuple, layout: str, tmp_path: Path, tokenizer: Path) -> None:
    expanded = {"augment_queries": True, "attend_to_mask_tokens": True} if layout == "colbert" else {}
    cfg, params = random_colbert(pair[1], **expanded)
    write = {"colbert": write_colbert, "pylate": write_pylate}[layout]
    write(epath.Path(tmp_path), cfg, params, tokenizer)
    again, back = load_retriever(str(tmp_path), cfg, jax.random.key(7))
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, back)
    assert open_retriever(tmp_path).conventions["augment_queries"] == bool(expanded)


def test_queries_are_augmented_only_where_they_are_attended_to(
    pair: tuple, tmp_path: Path, capsys: Any, tokenizer: Path
) -> None:
    """As published models were trained; an export that says otherwise is not written."""
    cfg, params = random_colbert(pair[1])
    write_pylate(epath.Path(tmp_path), cfg, params, tokenizer)
    card = tmp_path / "config_sentence_transformers.json"
    card.write_text(json.dumps(read_json(card) | {"do_query_expansion": True}))
    assert open_retriever(tmp_path).conventions["augment_queries"] is False
    assert "queries are not augmented" in capsys.readouterr().err
    card.write_text(json.dumps(read_json(card) | {"attend_to_expansion_tokens": True}))
    assert open_retriever(tmp_path).conventions["augment_queries"] is True
    wrong = cfg.model_copy(update={"augment_queries": True})
    with pytest.raises(HFError, match="augment_queries"):
        load_retriever(str(pair[3]), wrong, jax.random.key(0))


def test_stacked_dense_modules_are_one_projection(pair: tuple, tmp_path: Path, tokenizer: Path) -> None:
    """Widened and narrowed again with residuals, as mxbai-edge-colbert has them."""
    cfg, params = random_colbert(pair[1])
    write_pylate(epath.Path(tmp_path), cfg, params, tokenizer)
    rng = np.random.default_rng(4)
    w1, r1, w2, r2 = (rng.normal(size=s).astype(np.float32) for s in ((64, 32), (64, 32), (DIM, 64), (DIM, 64)))
    modules = read_json(tmp_path / "modules.json", kind=list)
    for number, (w, r) in enumerate(((w1, r1), (w2, r2)), 1):
        folder = tmp_path / f"{number}_Dense"
        folder.mkdir(exist_ok=True)
        save_file({"linear.weight": w, "residual.weight": r}, folder / "model.safetensors")
        said = {"in_features": w.shape[1], "out_features": w.shape[0], "bias": False, "use_residual": True}
        (folder / "config.json").write_text(json.dumps(said))
    listed = [*modules, dict(modules[1], path="2_Dense", idx=2, name="2")]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    back = load_retriever(str(tmp_path), cfg, jax.random.key(0))[1]
    np.testing.assert_allclose(back["projection"], ((w2 + r2) @ (w1 + r1)).T, atol=1e-4)
    import_checkpoint(tmp_path, tmp_path / "imported")
    again = load_retriever(str(tmp_path / "imported"), cfg, jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, back, again)
    (tmp_path / "1_Dense" / "config.json").write_text(
        json.dumps({"activation_function": "torch.nn.modules.activation.GELU"})
    )
    with pytest.raises(HFError, match="activation_function is 'torch.nn.modules.activation.GELU'"):
        open_retriever(tmp_path)
    listed[2]["type"] = "sentence_transformers.models.Whitening"
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(HFError, match="Whitening; a retriever is a Transformer and Dense modules"):
        open_retriever(tmp_path)


def test_it_retrieves(pair: tuple) -> None:
    """Unit vectors of documents longer than any window, skipped and padded tokens zero."""
    cfg, params = random_colbert(pair[1])
    skip_V = np.zeros(hf_models.VOCAB, bool)
    skip_V[IDS[0, 5]] = True
    p, keep = jax.jit(partial(F.encode_passages, cfg=cfg))(params, ids_NxP=IDS, length_N=LENGTHS, skip_V=skip_V)
    norm = np.linalg.norm(p, axis=-1)
    np.testing.assert_allclose(norm, keep, atol=1e-5)
    assert not keep[0, 5] and keep[1, :13].any() and not keep[1, 13:].any()
    assert set(leaves(F.abstract_params(cfg))) == {row.path for row in colbert_rows(cfg.bert)}
