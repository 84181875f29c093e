"""``config.json`` to our configurations and back: what changes the computation is honoured or refused by name.

Defaults of absent fields are those of transformers' own configuration classes; sizes must be stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

import transformers

from jmlr_jax.config_models import BertConfig, LlamaConfig, RopeScalingConfig
from jmlr_jax.hf.io import HFError

Model = TypeVar("Model", LlamaConfig, BertConfig)

# The class that a causal decoder's config.json names, and its transformers configuration.
DECODERS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}
# Classes around a BertModel trunk; their heads are not read.
ENCODERS = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "HF_ColBERT")

_SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
_SIZES += ["max_position_embeddings"]
_LLAMA_FIELDS = {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"}
_LLAMA_FIELDS |= {"rope_theta", "rope_scaling", "rope_parameters"}
_WINDOW_FIELDS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_FIELDS = {  # read by the functions below
    "llama": _LLAMA_FIELDS,
    "mistral": _LLAMA_FIELDS | {"sliding_window"},
    "qwen2": _LLAMA_FIELDS | _WINDOW_FIELDS,
    "qwen3": _LLAMA_FIELDS | _WINDOW_FIELDS,
    "bert": {*_SIZES, "type_vocab_size", "layer_norm_eps", "hidden_act"},
}
# Must have this value, which is what the code here computes.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "hidden_act": "silu",  # of decoders
}
# Of no consequence to what this project computes. Dropout of the base is off here: adapters have their own.
_HARMLESS = frozenset(
    """architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype initializer_range
    use_cache attention_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout pad_token_id
    bos_token_id eos_token_id unk_token_id sep_token_id cls_token_id id2label label2id output_attentions
    output_hidden_states return_dict problem_type pretraining_tp gradient_checkpointing chunk_size_feed_forward
    torchscript tokenizer_class finetuning_task task_specific_params directionality pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type max_sequence_length""".split()
)
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_ROPE_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow")}


def llama_from_hf(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """Shape of a decoder from the content of its config.json; dtypes and remat are left at their defaults.

    Args:
        raw: the JSON object.
        where: the file, for errors.

    Raises:
        HFError: names every field that cannot be honoured.
    """
    named = raw.get("architectures") or ["none"]
    if len(named) != 1 or named[0] not in DECODERS:
        raise HFError(f"{where}: architectures is {', '.join(named)}; read here are {', '.join(DECODERS)}")
    family = DECODERS[named[0]].model_type
    _stop(_refused(raw, family, _FIXED) + _refused_rope(raw), where)
    hf = _normalised(raw, DECODERS[named[0]], where)
    scaling, faults = _rope_from_hf(hf)
    window = getattr(hf, "sliding_window", None) if family != "llama" else None
    if family in ("qwen2", "qwen3"):
        kinds = set(hf.layer_types)
        if kinds == {"full_attention"}:
            window = None
        elif kinds != {"sliding_attention"}:
            faults.append(
                f"layer_types (use_sliding_window, max_window_layers) mixes {', '.join(sorted(kinds))}; "
                "here all layers have the window or none has"
            )
    _stop(faults, where)
    head_dim = getattr(hf, "head_dim", None)
    if head_dim is not None and head_dim * hf.num_attention_heads == hf.hidden_size:
        head_dim = None
    return LlamaConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        max_positions=hf.max_position_embeddings,
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=scaling,
        rms_norm_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
    )


def bert_from_hf(raw: Mapping[str, Any], where: str) -> BertConfig:
    """Shape of an encoder from the content of its config.json; dtypes and remat are left at their defaults.

    Raises:
        HFError: names every field that cannot be honoured.
    """
    named = raw.get("architectures") or ["none"]
    if raw.get("model_type") != "bert" or len(named) != 1 or named[0] not in ENCODERS:
        raise HFError(
            f"{where}: model_type is {raw.get('model_type')}, architectures is {', '.join(named)}; "
            f"a retriever's trunk is of model_type bert and one of {', '.join(ENCODERS)}"
        )
    fixed = {key: value for key, value in _FIXED.items() if key != "hidden_act"}
    fixed["tie_word_embeddings"] = raw.get("tie_word_embeddings")  # it concerns the pre-training head alone
    faults = _refused(raw, "bert", fixed)
    hf = _normalised(raw, transformers.BertConfig, where)
    acts = get_args(BertConfig.model_fields["hidden_act"].annotation)
    if hf.hidden_act not in acts:
        faults.append(f"hidden_act is {hf.hidden_act!r}; known are {', '.join(acts)}")
    _stop(faults, where)
    return BertConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        max_positions=hf.max_position_embeddings,
        type_vocab_size=hf.type_vocab_size,
        layer_norm_eps=hf.layer_norm_eps,
        hidden_act=hf.hidden_act,
    )


def llama_to_hf(cfg: LlamaConfig, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json for a decoder.

    Args:
        cfg: what was computed; param_dtype becomes the stored dtype.
        like: config.json of the checkpoint that training began from, which keeps its class and what is not ours to say.

    Raises:
        HFError: no transformers class computes this, or `like` describes another model.
    """
    window = cfg.sliding_window
    scaling = None
    if cfg.rope_scaling is not None:
        scaling = cfg.rope_scaling.model_dump(exclude={"type", "original_max_positions"}, exclude_none=True)
        kind = cfg.rope_scaling.type
        scaling = {
            name: scaling[name] for name in (*_ROPE_KEYS[kind], *_ROPE_OPTIONAL.get(kind, ())) if name in scaling
        }
        scaling |= {"rope_type": kind}
        if kind in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = cfg.rope_scaling.original_max_positions or cfg.max_positions
    architecture = "MistralForCausalLM" if window else "LlamaForCausalLM"
    if cfg.qk_norm or cfg.qkv_bias:
        architecture = "Qwen3ForCausalLM" if cfg.qk_norm else "Qwen2ForCausalLM"
    kind = DECODERS[architecture].model_type
    raw = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim or cfg.hidden_size // cfg.num_heads,
        "max_position_embeddings": cfg.max_positions,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": cfg.rms_norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = False
    if kind == "mistral":
        raw["sliding_window"] = window
    elif window:
        raw |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    raw = dict(like or raw) | {"vocab_size": cfg.vocab_size}
    _say_dtype(raw, cfg.param_dtype)
    _check_round_trip(cfg, llama_from_hf(raw, "config.json to be written"))
    return raw


def bert_to_hf(cfg: BertConfig, architecture: str, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json for an encoder of class `architecture`; otherwise as :func:`llama_to_hf`."""
    raw = {
        "model_type": "bert",
        "hidden_act": cfg.hidden_act,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "max_position_embeddings": cfg.max_positions,
        "type_vocab_size": cfg.type_vocab_size,
        "layer_norm_eps": cfg.layer_norm_eps,
        "position_embedding_type": "absolute",
    }
    raw = dict(like or raw) | {"architectures": [architecture], "vocab_size": cfg.vocab_size}
    _say_dtype(raw, cfg.param_dtype)
    _check_round_trip(cfg, bert_from_hf(raw, "config.json to be written"))
    return raw


def resolve(found: Model, asked: Model, tokens: int, key: str, where: str) -> Model:
    """The checkpoint's shape with the user's dtypes, remat and vocabulary.

    Args:
        found: from the checkpoint.
        asked: the section of the user's configuration. A shape left at its default takes the checkpoint's; one that was
            set must agree with it.
        tokens: size of the tokenizer that is used with the model; 0 if there is none yet.
        key: the section's name, for errors.
        where: the checkpoint, for errors.

    Returns:
        `found` with `asked`'s dtype, param_dtype and remat. Its vocabulary has asked.vocab_size rows, or as many as the
        checkpoint and the tokenizer need.

    Raises:
        HFError: names every disagreement.
    """
    if isinstance(asked, LlamaConfig) and asked.head_dim and asked.head_dim * found.num_heads == found.hidden_size:
        asked = asked.model_copy(update={"head_dim": None})  # said twice
    own = ("vocab_size", "max_positions", "dtype", "param_dtype", "remat")
    faults = [
        f"{key}.{name}={getattr(asked, name)!r}, the checkpoint has {getattr(found, name)!r}; leave it out"
        for name, field in type(asked).model_fields.items()
        if name not in own and getattr(asked, name) not in (field.default, getattr(found, name))
    ]
    if asked.max_positions > found.max_positions:
        faults.append(f"{key}.max_positions={asked.max_positions}, the checkpoint has {found.max_positions}; lower it")
    least = max(found.vocab_size, tokens)
    if asked.vocab_size and asked.vocab_size < least:
        faults.append(
            f"{key}.vocab_size={asked.vocab_size} is below the checkpoint's {found.vocab_size} "
            f"or the tokenizer's {tokens}; 0 takes what both need"
        )
    _stop(faults, where)
    taken = {name: getattr(asked, name) for name in ("dtype", "param_dtype", "remat")}
    return found.model_copy(update=taken | {"vocab_size": asked.vocab_size or least})


def _normalised(raw: Mapping[str, Any], kind: Any, where: str) -> Any:
    """transformers' configuration object, absent fields filled with its defaults."""
    missing = [name for name in _SIZES if raw.get(name) is None]
    if missing:
        raise HFError(f"{where}: does not state {', '.join(missing)}")
    if raw.get("model_type") != kind.model_type:
        raise HFError(
            f"{where}: model_type is {raw.get('model_type')!r} where architectures asks for {kind.model_type!r}"
        )
    try:
        return kind.from_dict(dict(raw))
    except Exception as error:  # its validators raise many kinds; all of them speak of this file
        raise HFError(f"{where}: transformers refuses it: {error}") from error


def _refused(raw: Mapping[str, Any], family: str, fixed: Mapping[str, Any]) -> list[str]:
    """Fields that have another value than the one computed here, or are not known."""
    faults = []
    for name, value in raw.items():
        if name in _FIELDS[family] or name in _HARMLESS or value is None:
            continue
        if name not in fixed:
            faults.append(
                f"{name} is not known here, so nobody can say whether it changes the computation; remove it if not"
            )
        elif value != fixed[name]:
            faults.append(f"{name} is {value!r}; only {fixed[name]!r} is computed here")
    return faults


def _refused_rope(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with a rotary scaling before its defaults are known."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_KEYS:
        return [f"rope_scaling of type {kind!r}; computed here are {', '.join(_ROPE_KEYS)}"]
    return [f"rope_scaling.{name} is missing" for name in _ROPE_KEYS[kind] if given.get(name) is None]


def _rope_from_hf(hf: Any) -> tuple[RopeScalingConfig | None, list[str]]:
    """Rotary scaling of a known type, and what is wrong with it."""
    given = {name: value for name, value in hf.rope_parameters.items() if value is not None and name != "type"}
    kind, _ = given.pop("rope_type", "default"), given.pop("rope_theta")
    given.pop("finetuned", None)  # a note in some YaRN checkpoints
    trained = given.pop("original_max_position_embeddings", hf.max_position_embeddings)
    faults = []
    if kind in ("default", "linear", "dynamic") and trained != hf.max_position_embeddings:
        faults.append(f"rope_scaling.original_max_position_embeddings with type {kind!r}, which does not use it")
    for name, value in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if given.pop(name, value) != value:
            faults.append(f"rope_scaling.{name} is not {value}")
    known = (*_ROPE_KEYS[kind], *_ROPE_OPTIONAL.get(kind, ()))
    faults += [f"rope_scaling.{name} is not computed here" for name in given if name not in known]
    if kind == "default" or faults:
        return None, faults
    return RopeScalingConfig(type=kind, original_max_positions=None if kind == "linear" else trained, **given), []


def _stop(faults: Sequence[str], where: str) -> None:
    if faults:
        raise HFError("\n".join([f"{where}:", *(f"  {fault}" for fault in faults)]))


def _say_dtype(raw: dict[str, Any], dtype: str) -> None:
    """Both names of the field are read by some tool; a file keeps the one it has."""
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype


def _check_round_trip(cfg: Model, back: Model) -> None:
    """Raises HFError naming the fields that config.json would change."""

    def shape(model: Model) -> dict[str, Any]:
        fields = model.model_dump(exclude={"dtype", "param_dtype", "remat"})
        if isinstance(model, LlamaConfig):
            fields["head_dim"] = model.head_dim or model.hidden_size // model.num_heads
            if model.rope_scaling is not None:
                used = model.rope_scaling.original_max_positions or model.max_positions
                fields["rope_scaling"]["original_max_positions"] = None if model.rope_scaling.type == "linear" else used
        return fields

    ours, theirs = shape(cfg), shape(back)
    faults = [f"{name} {ours[name]!r} would be read as {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
    if faults:
        raise HFError(f"config.json cannot express this model: {', '.join(faults)}")
