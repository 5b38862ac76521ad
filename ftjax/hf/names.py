"""Paths and Hugging Face names: one rule, both ways, for every family.

model.layers.7.self_attn.q_proj.weight [o, i]   <->   layers/self_attn/q_proj/kernel [L, i, o], layer 7
model.layers.7.input_layernorm.weight  [d]      <->   layers/input_layernorm/scale [L, d], layer 7
model.embed_tokens.weight              [v, d]   <->   embed_tokens/kernel [v, d]
lm_head.weight                         [v, d]   <->   lm_head/kernel [d, v]
score.weight                           [1, d]   <->   value_head/kernel [d, 1], in a …ForSequenceClassification
"""

from __future__ import annotations

import re

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_OUTSIDE = {"lm_head": "lm_head", "value_head": "score"}
"""The modules that are not in `model`."""

# What multimodal and headless checkpoints write before the name of a text model's tensor.
_PREFIXES = (
    (re.compile(r"(model\.)?language_model\.(model\.)?(lm_head\.)"), r"\3"),
    (re.compile(r"(model\.)?language_model\.(model\.)?"), "model."),
    (re.compile(r"(?=layers\.|embed_tokens\.|norm\.weight$)"), "model."),
)

IGNORABLE = (
    r".*rotary_emb\.inv_freq",  # buffers of old transformers releases: computed from the config
    r".*\.(attn|self_attn)\.(masked_)?bias",  # causal masks saved as buffers
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*",  # the other half of a multimodal checkpoint
)
"""Tensors that a checkpoint may hold and no text model has a place for."""


def canonical(name: str) -> str:
    """Return a tensor's name as a plain text model writes it: `language_model.model.norm.weight` is `model.norm.weight`."""
    for pattern, replacement in _PREFIXES:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def ignorable(name: str) -> bool:
    """Return whether a checkpoint's tensor may be left unread."""
    return any(re.fullmatch(pattern, name) for pattern in IGNORABLE)


def is_stacked(path: str) -> bool:
    """Return whether the leaf has a leading axis of layers."""
    return path.startswith("layers/")


def is_transposed(path: str) -> bool:
    """Return whether Hugging Face stores the matrix as `[o, i]` where we hold `[i, o]`: all but the embedding."""
    return path.endswith("/kernel") and path != "embed_tokens/kernel"


def modules(path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the Hugging Face modules that own a leaf of this shape: one, or `model.layers.7.self_attn.q_proj` for each layer."""
    owner = path.rpartition("/")[0].replace("/", ".")
    if is_stacked(path):
        return [f"model.layers.{layer}.{owner.removeprefix('layers.')}" for layer in range(shape[0])]
    return [_OUTSIDE.get(owner, f"model.{owner}")]


def tensors(path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the Hugging Face tensors that a leaf of this shape is made of: one, or one for each layer."""
    return [f"{module}.{_LEAVES[path.rpartition('/')[2]]}" for module in modules(path, shape)]


def path(name: str) -> tuple[str, int | None]:
    """Return `(path, layer)` of a Hugging Face tensor; the layer is None outside the trunk.

    Raises:
      ValueError: the name does not end in `.weight` or `.bias`.
    """
    owner, _, leaf = canonical(name).rpartition(".")
    if leaf not in ("weight", "bias") or not owner:
        raise ValueError(f"hf: {name!r} is not the name of a parameter: expected it to end in '.weight' or '.bias'")
    layer = LAYER.fullmatch(owner)
    inside = next((ours for ours, theirs in _OUTSIDE.items() if theirs == owner), owner.removeprefix("model."))
    owner = f"layers.{layer[2]}" if layer else inside
    if leaf == "weight":
        leaf = "scale" if owner.endswith("norm") else "kernel"
    return f"{owner}.{leaf}".replace(".", "/"), int(layer[1]) if layer else None


def leaf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of each of the `tensors` of a leaf of this shape."""
    shape = tuple(shape[1:]) if is_stacked(path) else tuple(shape)
    return shape[::-1] if is_transposed(path) else shape
