"""What reading and writing any ``config.json`` shares: fields that are honoured, known not to matter, or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from jmlr_jax.config_models import BertConfig, LlamaConfig, RopeScalingConfig
from jmlr_jax.hf.io import HFError

Model = TypeVar("Model", LlamaConfig, BertConfig)

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["max_position_embeddings"]
# Must have this value, which is what the code here computes.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
}
# Of no consequence to what this project computes. Dropout of the base is off here: adapters have their own.
_HARMLESS = frozenset(
    """architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype initializer_range
    use_cache attention_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout pad_token_id
    bos_token_id eos_token_id unk_token_id sep_token_id cls_token_id id2label label2id output_attentions
    output_hidden_states return_dict problem_type pretraining_tp gradient_checkpointing chunk_size_feed_forward
    torchscript tokenizer_class finetuning_task task_specific_params directionality pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type max_sequence_length
    cache_implementation""".split()
)
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_ROPE_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow")}
# Names of kinds of attention there, ours here.
KINDS = {"full_attention": "full", "sliding_attention": "window"}


def normalised(raw: Mapping[str, Any], kind: Any, where: str) -> Any:
    """transformers' configuration object, absent fields filled with its defaults."""
    missing = [name for name in SIZES if raw.get(name) is None]
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


def refused(raw: Mapping[str, Any], read: Collection[str], fixed: Mapping[str, Any]) -> list[str]:
    """Fields that have another value than the one computed here, or are not known.

    Args:
        read: fields that the caller honours.
        fixed: fields with the one value that is computed.
    """
    faults = []
    for name, value in raw.items():
        if name in read or name in _HARMLESS or value is None:
            continue
        if name not in fixed:
            faults.append(
                f"{name} is not known here, so nobody can say whether it changes the computation; remove it if not"
            )
        elif value != fixed[name]:
            faults.append(f"{name} is {value!r}; only {fixed[name]!r} is computed here")
    return faults


def refused_layers(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with kinds of layers and rotary scalings before their defaults are known."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    faults = []
    if unknown := sorted({str(name) for name in raw.get("layer_types") or ()} - set(KINDS)):
        faults.append(f"layer_types names {', '.join(unknown)}; computed here are {', '.join(KINDS)}")
    for one in [given[kind] or {} for kind in KINDS if kind in given] or [given]:
        kind = one.get("rope_type", one.get("type", "default"))
        if kind not in _ROPE_KEYS:
            faults.append(f"rope_scaling of type {kind!r}; computed here are {', '.join(_ROPE_KEYS)}")
        else:
            faults += [f"rope_scaling.{name} is missing" for name in _ROPE_KEYS[kind] if one.get(name) is None]
    return faults


def rope_from_hf(rope: Mapping[str, Any], longest: int) -> tuple[RopeScalingConfig | None, list[str]]:
    """Rotary scaling of a known type, and what is wrong with it.

    Args:
        rope: the content of ``rope_parameters``, or of its part for one kind of layers.
        longest: max_position_embeddings.
    """
    given = {name: value for name, value in rope.items() if value is not None and name != "type"}
    kind, _ = given.pop("rope_type", "default"), given.pop("rope_theta")
    given.pop("finetuned", None)  # a note in some YaRN checkpoints
    trained = given.pop("original_max_position_embeddings", longest)
    faults = []
    if kind in ("default", "linear", "dynamic") and trained != longest:
        faults.append(f"rope_scaling.original_max_position_embeddings with type {kind!r}, which does not use it")
    for name, value in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if given.pop(name, value) != value:
            faults.append(f"rope_scaling.{name} is not {value}")
    known = (*_ROPE_KEYS[kind], *_ROPE_OPTIONAL.get(kind, ()))
    faults += [f"rope_scaling.{name} is not computed here" for name in given if name not in known]
    if kind == "default" or faults:
        return None, faults
    return RopeScalingConfig(type=kind, original_max_positions=None if kind == "linear" else trained, **given), []


def rope_to_hf(scaling: RopeScalingConfig | None, longest: int) -> dict[str, Any] | None:
    """The content of ``rope_scaling``; None if nothing is scaled."""
    if scaling is None:
        return None
    said = scaling.model_dump(exclude={"type", "original_max_positions"}, exclude_none=True)
    names = (*_ROPE_KEYS[scaling.type], *_ROPE_OPTIONAL.get(scaling.type, ()))
    raw: dict[str, Any] = {name: said[name] for name in names if name in said}
    raw["rope_type"] = scaling.type
    if scaling.type in ("llama3", "yarn"):
        raw["original_max_position_embeddings"] = scaling.original_max_positions or longest
    return raw


def kinds_from_hf(hf: Any, window: int | None) -> tuple[dict[str, Any], list[str]]:
    """Fields of `AttentionConfig` from ``layer_types`` and the rotations of both kinds, and what is wrong with them.

    Args:
        hf: transformers' configuration object, defaults filled in.
        window: what a layer with a window sees.
    """
    named = getattr(hf, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    kinds, rope = [KINDS[name] for name in named], hf.rope_parameters
    apart = any(kind in rope for kind in KINDS)
    full, narrow = (rope[kind] for kind in KINDS) if apart else (rope, None)
    scaling, faults = rope_from_hf(full, hf.max_position_embeddings)
    fields: dict[str, Any] = {"rope_theta": float(full["rope_theta"]), "rope_scaling": scaling}
    if "window" not in kinds:
        return fields, faults
    if window is None:
        return fields, [*faults, "layer_types names sliding_attention, but sliding_window is not stated"]
    fields["sliding_window"] = window
    if narrow is not None:
        scaled, more = rope_from_hf(narrow, hf.max_position_embeddings)
        faults += more + (["rope_parameters.sliding_attention scales; only its base is computed"] if scaled else [])
        fields["window_rope_theta"] = float(narrow["rope_theta"])
    if "full" in kinds:
        period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
        fields["layer_kinds"] = tuple(kinds[:period])
    return fields, faults


def kinds_to_hf(cfg: LlamaConfig | BertConfig) -> list[str]:
    """``layer_types``: the kind of each layer."""
    return ["full_attention" if window is None else "sliding_attention" for window in cfg.windows]


def stop(faults: Sequence[str], where: str) -> None:
    """Raises HFError with all of `faults`, if there are any."""
    if faults:
        raise HFError("\n".join([f"{where}:", *(f"  {fault}" for fault in faults)]))


def say_dtype(raw: dict[str, Any], dtype: str) -> None:
    """Both names of the field are read by some tool; a file keeps the one it has."""
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype


def check_round_trip(cfg: Model, back: Model) -> None:
    """Raises HFError naming the fields that config.json would change."""

    def shape(model: Model) -> dict[str, Any]:
        fields = model.model_dump(exclude={"dtype", "param_dtype", "remat"})
        fields["layer_kinds"] = model.windows
        if model.window_rope_theta is None and model.rope_scaling is None and model.sliding_window:
            fields["window_rope_theta"] = model.rope_theta
        if isinstance(model, LlamaConfig):
            fields["head_dim"] = model.head_width
            fields["query_pre_attn_scalar"] = model.query_pre_attn_scalar or model.head_width
        if model.rope_scaling is not None:
            used = model.rope_scaling.original_max_positions or model.max_positions
            fields["rope_scaling"]["original_max_positions"] = None if model.rope_scaling.type == "linear" else used
        return fields

    ours, theirs = shape(cfg), shape(back)
    faults = [f"{name} {ours[name]!r} would be read as {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
    if faults:
        raise HFError(f"config.json cannot express this model: {', '.join(faults)}")
