"""config.json: what published models say, back and forth, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from jmlr_jax.config_models import BertConfig, LlamaConfig, RopeScalingConfig
from jmlr_jax.hf.config import DECODERS, llama_from_hf, llama_to_hf, resolve
from jmlr_jax.hf.encoder_config import bert_from_hf, bert_to_hf
from jmlr_jax.hf.io import HFError

# Fields as the published checkpoints state them.
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA31_8B = LLAMA2_7B | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_06B = QWEN2_7B | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
MEDGEMMA_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
MEDGEMMA_27B = {
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "model_type": "gemma3_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
BERT = {
    "architectures": ["HF_ColBERT"],
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}


def test_published_decoders() -> None:
    assert llama_from_hf(LLAMA2_7B, "f") == LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        max_positions=4096,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
    )
    llama3 = llama_from_hf(LLAMA31_8B, "f")
    assert (llama3.num_kv_heads, llama3.rope_theta, llama3.head_dim) == (8, 500000.0, None)
    assert llama3.rope_scaling == RopeScalingConfig(
        type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=8192
    )
    assert llama_from_hf(MISTRAL_7B, "f").sliding_window == 4096
    qwen2 = llama_from_hf(QWEN2_7B, "f")
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.sliding_window) == (True, False, None)
    qwen3 = llama_from_hf(QWEN3_06B, "f")
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim, qwen3.tie_embeddings) == (False, True, 128, True)


def test_published_gemmas() -> None:
    one = llama_from_hf(GEMMA3_1B, "f")
    assert (one.block, one.qk_norm, one.tie_embeddings, one.head_dim) == ("gemma", True, True, 256)
    assert one.layer_kinds == (*["window"] * 5, "full") and one.windows[4:7] == (512, None, 512)
    assert (one.rope_theta, one.window_rope_theta, one.query_pre_attn_scalar) == (1e6, 1e4, None)
    four = llama_from_hf(MEDGEMMA_4B, "f")
    assert (four.num_heads, four.num_kv_heads, four.head_dim, four.vocab_size) == (8, 4, 256, 262208)
    assert four.rope_scaling == RopeScalingConfig(type="linear", factor=8.0) and four.max_positions == 131072
    large = llama_from_hf(MEDGEMMA_4B | {"text_config": MEDGEMMA_27B}, "f")
    assert (large.query_pre_attn_scalar, large.windows.count(None), large.num_kv_heads) == (168, 10, 16)


def test_a_nested_decoder_is_written_alone() -> None:
    cfg = llama_from_hf(MEDGEMMA_4B, "f")
    raw = llama_to_hf(cfg.model_copy(update={"param_dtype": "bfloat16"}), MEDGEMMA_4B)
    assert raw["architectures"] == ["Gemma3ForCausalLM"] and raw["eos_token_id"] == [1, 106]
    assert llama_from_hf(raw, "f") == cfg
    assert transformers.Gemma3TextConfig.from_dict(raw).rope_parameters["full_attention"]["factor"] == 8.0


@pytest.mark.parametrize(
    "raw", [LLAMA2_7B, LLAMA31_8B, MISTRAL_7B, QWEN2_7B, QWEN3_06B, GEMMA3_1B], ids=lambda raw: raw["model_type"]
)
def test_round_trip_keeps_the_file(raw: dict[str, Any]) -> None:
    cfg = llama_from_hf(raw, "f")
    back = llama_to_hf(cfg.model_copy(update={"param_dtype": raw["torch_dtype"]}), raw)
    assert back == raw
    without = llama_to_hf(cfg)  # nothing to begin from: other words for the same model, same class
    assert llama_from_hf(without, "f") == cfg
    assert without["architectures"] == raw["architectures"]


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig(type="linear", factor=2.0),
        RopeScalingConfig(type="dynamic", factor=2.0),
        RopeScalingConfig(type="llama3", factor=8.0, original_max_positions=256),
        RopeScalingConfig(type="yarn", factor=4.0, original_max_positions=128, attention_factor=1.3, beta_fast=16.0),
    ],
    ids=lambda scaling: scaling.type,
)
@pytest.mark.parametrize("more", [{}, {"qkv_bias": True, "sliding_window": 7}, {"qk_norm": True, "head_dim": 32}])
def test_own_shapes_are_read_by_transformers(scaling: RopeScalingConfig, more: dict[str, Any]) -> None:
    cfg = LlamaConfig(vocab_size=99, rope_scaling=scaling, **more)
    raw = llama_to_hf(cfg)
    hf = DECODERS[raw["architectures"][0]].from_dict(raw)
    assert (hf.rope_parameters["rope_type"], hf.rope_parameters["factor"]) == (scaling.type, scaling.factor)
    assert llama_to_hf(llama_from_hf(raw, "f")) == raw


def test_a_model_without_a_class_is_not_written() -> None:
    with pytest.raises(HFError, match=r"cannot express this model: qkv_bias True would be read as False"):
        llama_to_hf(LlamaConfig(vocab_size=99, qkv_bias=True, qk_norm=True))
    with pytest.raises(HFError, match="hidden_size 64 would be read as 4096"):
        llama_to_hf(LlamaConfig(vocab_size=32000), LLAMA2_7B)


REFUSED = {
    "attention_bias is True": LLAMA2_7B | {"attention_bias": True},
    "mlp_bias is True": LLAMA2_7B | {"mlp_bias": True},
    "hidden_act is 'gelu'": LLAMA2_7B | {"hidden_act": "gelu"},
    "quantization_config is not known": LLAMA2_7B | {"quantization_config": {"bits": 4}},
    "auto_map is not known": LLAMA2_7B | {"auto_map": {"AutoModel": "x.Y"}},
    "logit_scale is not known": LLAMA2_7B | {"logit_scale": 0.5},
    "partial_rotary_factor": LLAMA2_7B | {"partial_rotary_factor": 0.5},
    "of type 'longrope'": LLAMA2_7B
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
    "rope_scaling.factor is missing": LLAMA2_7B | {"rope_scaling": {"rope_type": "linear"}},
    "rope_scaling.low_freq_factor is not computed": LLAMA2_7B
    | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
    "rope_scaling.mscale is not computed": LLAMA2_7B
    | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5}},
    "rope_scaling.truncate": LLAMA2_7B | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
    "rope_scaling.original_max_position_embeddings": LLAMA2_7B
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
    "layer_types names chunked_attention": QWEN3_06B | {"layer_types": ["chunked_attention"] * 28},
    "sliding_attention, but sliding_window is not": QWEN3_06B | {"layer_types": ["sliding_attention"] * 28},
    "final_logit_softcapping is 30.0; only None": GEMMA3_1B | {"final_logit_softcapping": 30.0},
    "use_bidirectional_attention is True": GEMMA3_1B | {"use_bidirectional_attention": True},
    "hidden_activation is 'gelu'; only 'gelu_pytorch_tanh'": GEMMA3_1B | {"hidden_activation": "gelu"},
    "_sliding_window_pattern is 2 without layer_types": GEMMA3_1B | {"_sliding_window_pattern": 2},
    "rope_parameters.sliding_attention scales": GEMMA3_1B
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        }
    },
    "audio_config is not known here": MEDGEMMA_4B | {"audio_config": {}},
    "text_config.hidden_size is missing": MEDGEMMA_4B
    | {"text_config": {"num_hidden_layers": 2, "intermediate_size": 8}},
    "architectures is Gemma4ForConditionalGeneration; read here are LlamaForCausalLM": MEDGEMMA_4B
    | {"architectures": ["Gemma4ForConditionalGeneration"]},
    "does not state vocab_size, hidden_size": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "architectures is GPTNeoXForCausalLM": LLAMA2_7B | {"architectures": ["GPTNeoXForCausalLM"]},
    "model_type is 'llama' where": LLAMA2_7B | {"architectures": ["MistralForCausalLM"]},
    "transformers refuses it": LLAMA2_7B | {"num_attention_heads": 33},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message: str) -> None:
    with pytest.raises(HFError, match=message) as error:
        llama_from_hf(REFUSED[message], "models/x/config.json")
    assert str(error.value).startswith("models/x/config.json")


def test_all_refusals_at_once() -> None:
    raw = LLAMA2_7B | {"attention_bias": True, "hidden_act": "relu", "rope_scaling": {"type": "longrope"}}
    with pytest.raises(HFError) as error:
        llama_from_hf(raw, "f")
    assert all(name in str(error.value) for name in ("attention_bias", "hidden_act", "longrope"))


def test_encoder() -> None:
    cfg = bert_from_hf(BERT, "f")
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12, "max_positions": 512}
    assert cfg == BertConfig(vocab_size=30522, **shape)
    assert bert_to_hf(cfg, "HF_ColBERT", BERT) == BERT | {"torch_dtype": "float32"}
    again = transformers.BertConfig.from_dict(bert_to_hf(cfg, "BertModel"))
    assert bert_from_hf(again.to_dict(), "f") == cfg


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("position_embedding_type is 'relative_key'", {"position_embedding_type": "relative_key"}),
        ("is_decoder is True", {"is_decoder": True}),
        ("hidden_act is 'swish'", {"hidden_act": "swish"}),
        ("model_type is roberta", {"model_type": "roberta"}),
        ("architectures is BertForSequenceClassification", {"architectures": ["BertForSequenceClassification"]}),
        ("embedding_size is not known", {"embedding_size": 128}),
    ],
)
def test_encoder_refused_by_name(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(HFError, match=message):
        bert_from_hf(BERT | change, "f")


def test_transformers_has_no_field_that_is_not_decided() -> None:
    """A field that a new transformers release adds would be refused in files that state it: this says which."""
    for cls, kind in DECODERS.items():
        tiny = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8}
        llama_from_hf(kind(**tiny).to_dict() | {"architectures": [cls]}, cls)
    for kind in (transformers.BertConfig, transformers.ModernBertConfig):
        cls = kind.__name__.replace("Config", "Model")
        bert_from_hf(kind().to_dict() | {"architectures": [cls]}, cls)
    nested = transformers.Gemma3Config().to_dict()
    llama_from_hf(nested | {"architectures": ["Gemma3ForConditionalGeneration"]}, "nested")


def test_resolve_takes_the_checkpoint_and_names_disagreements() -> None:
    found = llama_from_hf(QWEN3_06B, "f")
    asked = LlamaConfig(dtype="bfloat16", param_dtype="bfloat16", remat="full", hidden_size=1024, max_positions=4096)
    resolved = resolve(found, asked, 151669, "generator.llama", "models/q")
    assert resolved == found.model_copy(update={"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"})
    assert resolve(found, asked.model_copy(update={"vocab_size": 152064}), 0, "k", "w").vocab_size == 152064
    assert resolve(found, asked, 151937, "k", "w").vocab_size == 151937
    wrong = LlamaConfig(hidden_size=2048, num_layers=3, max_positions=50000, vocab_size=1000)
    with pytest.raises(HFError) as error:
        resolve(found, wrong, 0, "generator.llama", "models/q")
    for part in ("hidden_size=2048", "has 1024", "num_layers=3", "max_positions=50000", "vocab_size=1000", "models/q"):
        assert part in str(error.value)
