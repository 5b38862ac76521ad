"""Hugging Face's `config.json` in and out; strict, so that an option we do not implement is refused, never dropped in silence.

Both spellings are read: `rope_theta`, `rope_scaling` and `torch_dtype` (transformers 4), `rope_parameters` and `dtype` (transformers 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftjax import tree
from ftjax.models.config import SIZES, Config, Rope, not_positive, problems
from ftjax.models.decoder import Family
from ftjax.models.families import FAMILIES

IGNORED = frozenset(
    "architectures transformers_version transformers.js_config _name_or_path _attn_implementation_autoset attn_implementation use_cache "
    "cache_implementation return_dict output_hidden_states output_attentions chunk_size_feed_forward pretraining_tp id2label label2id "
    "num_labels problem_type is_llama_config tokenizer_class task_specific_params torchscript unsloth_fixed unsloth_version "
    "_sliding_window_pattern boi_token_index eoi_token_index image_token_index mm_tokens_per_image vision_config model_type".split()
)
"""Keys that say nothing of the function a text model computes."""

ONLY = {
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
}
"""Keys that are read but have only these implemented values."""

_ANYWHERE = ("dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta")
_WRAPPERS = {"gemma3": "text_config"}
_INHERITED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
_ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
_ROPE_OPTIONS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "yarn": (("factor",), (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}
"""What each kind needs, and what it may have beside."""
_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings rms_norm_eps "
    "tie_word_embeddings initializer_range bos_token_id pad_token_id"
).split()
_OPTIONAL = ("attention_bias", "mlp_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def config_from_hf(raw: Mapping[str, Any]) -> Config:
    """Return the architecture that a `config.json` describes.

    Args:
      raw: the parsed file. A multimodal wrapper (`gemma3`) stands for its text model.

    Raises:
      ValueError: the family or an option is not implemented, or values contradict each other; the message lists every problem.
    """
    raw = _unwrap(raw)
    family = _family(raw)
    found = _unknown(raw, family)
    raw = {**family.defaults, **raw}
    heads = raw["num_attention_heads"]
    raw["num_key_value_heads"] = heads if raw["num_key_value_heads"] is None else raw["num_key_value_heads"]
    found += not_positive(raw, [name for name in SIZES if name != "head_dim"])
    rope, local_rope = _ropes(raw, family, found)
    if found:
        raise ValueError(_message(family, found))
    kinds = tuple(raw.get("layer_types") or family.layer_types(raw))
    eos = raw["eos_token_id"]
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    config = Config(
        model_type=family.model_type,
        **{name: raw[name] for name in _COPIED},
        **{name: raw[name] for name in _OPTIONAL if name in family.defaults},
        num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw["hidden_size"] // heads if raw.get("head_dim") is None else raw["head_dim"],
        hidden_act=raw[_activation_key(family)],
        rope=rope,
        local_rope=local_rope,
        layer_types=kinds,
        sliding_window=raw["sliding_window"] if "sliding_attention" in kinds else None,
        dtype=str(dtype).removeprefix("torch."),
        eos_token_id=tuple(eos) if isinstance(eos, list | tuple) else eos,
    )
    if found := problems(config):
        raise ValueError(_message(family, found))
    return config


def to_hf(config: Config, *, classifies: bool = False) -> dict[str, Any]:
    """Return a `config.json` that transformers 4 and 5 both read; `config_from_hf` gives the config back.

    Args:
      config: the architecture.
      classifies: name the class with a head of one label instead of the language model.
    """
    family = FAMILIES[config.model_type]
    architecture = family.architecture.replace("CausalLM", "SequenceClassification") if classifies else family.architecture
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if classifies else {}
    raw: dict[str, Any] = {"architectures": [architecture], **labels, "model_type": config.model_type, "torch_dtype": config.dtype}
    raw |= {name: getattr(config, name) for name in (*_COPIED, "num_key_value_heads", "head_dim")}
    raw |= {name: getattr(config, name) for name in _OPTIONAL if name in family.defaults}
    raw["eos_token_id"] = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    raw[_activation_key(family)] = config.hidden_act
    raw |= {"rope_theta": config.rope.rope_theta, "rope_scaling": _scaling(config.rope)}
    if config.local_rope is not None:
        raw["rope_local_base_freq"] = config.local_rope.rope_theta
    if "sliding_window" in family.defaults:
        raw["sliding_window"] = config.sliding_window
    if "layer_types" in family.defaults:
        raw["layer_types"] = list(config.layer_types)
    if "use_sliding_window" in family.defaults:
        raw["use_sliding_window"] = config.sliding_window is not None
    return raw


def stretch(config: Config, options: Mapping[str, Any]) -> Config:
    """Return the architecture for a longer context: with another RoPE, and as many positions as that is meant for.

    max_position_embeddings = factor · original_max_position_embeddings

    Args:
      config: the model's own.
      options: as the `rope_scaling` of a `config.json`: `{"rope_type": "linear", "factor": 4.0}`, or of kind "yarn" or "llama3" with their
        options. `original_max_position_embeddings`, the context that is stretched, is the config's `max_position_embeddings` if left out.

    Raises:
      ValueError: an option is unknown or missing, or the RoPE is stretched already and `original_max_position_embeddings` is left out.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if config.rope.rope_type != "default" and _ORIGINAL not in options:
        raise ValueError(
            f"the model's RoPE is stretched already ({_scaling(config.rope)}); say {_ORIGINAL}, the context it had before, to replace that."
        )
    original, factor = options.get(_ORIGINAL, config.max_position_embeddings), options.get("factor", 1)
    if not all(isinstance(number, int | float) and math.isfinite(number) and number > 0 for number in (original, factor)):
        raise ValueError(f"factor and {_ORIGINAL} must be positive numbers, not {factor!r} and {original!r}.")
    scaling = {name: value for name, value in options.items() if name != _ORIGINAL}
    if scaling.get("rope_type") != "linear":  # which has no place for it
        scaling[_ORIGINAL] = original
    return config_from_hf(to_hf(config) | {"rope_scaling": scaling, "max_position_embeddings": round(original * factor)})


def _message(family: Family, found: list[str]) -> str:
    return f"config.json of {family.model_type}: " + "; ".join(found) + "."


def _unwrap(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    key = _WRAPPERS.get(raw.get("model_type", ""))
    if key is None or key not in raw:
        return raw
    return {**{name: raw[name] for name in _INHERITED if name in raw}, "model_type": f"{raw['model_type']}_text", **raw[key]}


def _family(raw: Mapping[str, Any]) -> Family:
    name = raw.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type {name!r} is not implemented; nearest: {tree.nearest(str(name), FAMILIES)}.")
    return FAMILIES[name]


def _unknown(raw: Mapping[str, Any], family: Family) -> list[str]:
    known = {*family.defaults, *_ANYWHERE, *ONLY}
    ignored = IGNORED | ({"hidden_act"} if _activation_key(family) == "hidden_activation" else set())
    found = []
    for name, value in raw.items():
        if name in ONLY and value not in ONLY[name]:
            found.append(f"{name} {value!r} is not implemented, only {' or '.join(map(repr, ONLY[name]))} is")
        elif name not in known | ignored:
            found.append(f"{name!r} is not a known option; nearest: {tree.nearest(name, known)}")
    return found


def _activation_key(family: Family) -> str:
    return "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"


def _ropes(raw: Mapping[str, Any], family: Family, found: list[str]) -> tuple[Rope, Rope | None]:
    """Return the embedding of full and, where the family has its own, of sliding layers; append what is wrong to `found`."""
    has_local = "rope_local_base_freq" in family.defaults
    given = raw.get("rope_parameters") or {}
    nested = any(isinstance(value, Mapping) for value in given.values())
    if nested and not has_local:
        found.append(f"rope_parameters by layer type are not known in {family.model_type}")
    main = (given.get("full_attention") if nested else given) or {}
    rope = _rope({"rope_theta": raw["rope_theta"], **(raw.get("rope_scaling") or {}), **main}, raw, found)
    if not has_local:
        return rope, None
    local = (given.get("sliding_attention") if nested else None) or {}
    return rope, _rope({"rope_theta": raw["rope_local_base_freq"], **local}, raw, found)


def _rope(given: Mapping[str, Any], raw: Mapping[str, Any], found: list[str]) -> Rope:
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("partial_rotary_factor", 1) not in ONLY["partial_rotary_factor"]:
        found.append("partial_rotary_factor is not implemented, only 1 is")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_OPTIONS:  # which `problems` says
        return Rope(rope_theta=float(given["rope_theta"]), rope_type=kind)
    needed, optional = _ROPE_OPTIONS[kind]
    known = (*_ROPE_KEYS, *needed, *optional)
    found += [f"rope_type {kind!r} has no option {name!r}; nearest: {tree.nearest(name, known)}" for name in given if name not in known]
    if missing := [name for name in needed if name not in given]:
        found.append(f"rope_type {kind!r} needs {', '.join(missing)}")
    options = {name: given[name] for name in (*needed, *optional) if name in given}
    bad = [name for name, value in options.items() if not isinstance(value, bool if name == "truncate" else int | float)]
    found += [f"rope option {name!r} must be a number, not {options.pop(name)!r}" for name in bad]
    if _ORIGINAL in optional:
        options.setdefault(_ORIGINAL, raw["max_position_embeddings"])
    exact = (_ORIGINAL, "truncate")
    numbers = {name: value if name in exact else float(value) for name, value in options.items()}
    return Rope(rope_theta=float(given["rope_theta"]), rope_type=kind, **numbers)


def _scaling(rope: Rope) -> dict[str, Any] | None:
    """Return the rope_scaling of `config.json`: what the kind needs, and of its other options those that are not the default."""
    if rope.rope_type == "default":
        return None
    (needed, optional), plain = _ROPE_OPTIONS[rope.rope_type], Rope(rope_theta=0.0)
    names = [*needed, *(name for name in optional if getattr(rope, name) != getattr(plain, name))]
    return {"rope_type": rope.rope_type, **{name: getattr(rope, name) for name in names}}
