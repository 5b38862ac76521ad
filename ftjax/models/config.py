"""The architecture of a language model as plain data: everything that shapes its parameters or its function, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPES = ("float32", "bfloat16", "float16")

ROPES_BY_LENGTH = {
    "dynamic": "its frequencies change with the length of the text, which a cache of turned keys cannot follow; yarn and linear are fixed",
    "longrope": "the length of the text chooses between two tables, which a cache of turned keys cannot follow; yarn and linear are fixed",
}
"""The kinds of transformers that are no function of the position alone, and why they are refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of a rotary position embedding; the names are those of Hugging Face's `rope_parameters`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    """The context that the model was trained with, before it was stretched (llama3, yarn)."""
    attention_factor: float | None = None
    """Of yarn: the factor of cosines and sines, so that scores grow by its square; None: as `ftjax.models.rope.attention_factor` says."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    """Of yarn: a pair that turns at least so often within the original context is not stretched."""
    beta_slow: float = 1.0
    """Of yarn: one that turns at most so often is stretched by the whole factor."""
    truncate: bool = True
    """Of yarn: round the two bounds between pairs to whole ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An architecture. The names are those of Hugging Face's `config.json`, with every default filled in.

    `config_from_hf` makes one and checks it; `problems` says what is wrong with one made by hand.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: Rope
    layer_types: tuple[str, ...]
    """One of `LAYER_TYPES` for each layer."""
    local_rope: Rope | None = None
    """The embedding of the sliding layers where it differs from `rope`."""
    sliding_window: int | None = None
    """How many positions a query of a sliding layer sees, itself included."""
    attention_bias: bool = False
    mlp_bias: bool = False
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its square root; None means `head_dim`."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    initializer_range: float = 0.02
    dtype: str = "float32"
    """The dtype of randomly initialised weights, and the one a checkpoint was written in."""
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def attention_scale(self) -> float:
        """The factor of the attention scores."""
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it sees everything."""
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)

    @property
    def uniform_window(self) -> int | None:
        """The window that all layers have; attention then leaves out keys by their place in the row (see `ftjax.kernels.attention`)."""
        windows = set(self.windows)
        return windows.pop() if len(windows) == 1 else None


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""The fields that must be positive integers."""


def problems(config: Config) -> list[str]:
    """Return all that is wrong with a config, in words; empty if nothing is."""
    if found := not_positive(vars(config), SIZES):
        return found
    if config.num_attention_heads % config.num_key_value_heads:
        found.append(f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads {config.num_key_value_heads}")
    if config.head_dim % 2:
        found.append(f"head_dim {config.head_dim} is odd, and rotary embeddings turn pairs")
    found += _bad_choice("hidden_act", config.hidden_act, ACTIVATIONS) + _bad_choice("dtype", config.dtype, DTYPES)
    for kind in sorted(set(config.layer_types)):
        found += _bad_choice("layer_types", kind, LAYER_TYPES)
    if len(config.layer_types) != config.num_hidden_layers:
        found.append(f"layer_types names {len(config.layer_types)} layers of {config.num_hidden_layers}")
    if "sliding_attention" in config.layer_types and not config.sliding_window:
        found.append("layer_types has sliding_attention but sliding_window is not set")
    for rope in filter(None, (config.rope, config.local_rope)):
        found += _rope_problems(rope)
    return found


def _rope_problems(rope: Rope) -> list[str]:
    kind, original = rope.rope_type, rope.original_max_position_embeddings
    if kind in ROPES_BY_LENGTH:
        return [f"rope_type {kind!r} is not supported: {ROPES_BY_LENGTH[kind]}"]
    found = _bad_choice("rope_type", kind, ROPE_KINDS)
    if not (math.isfinite(rope.factor) and rope.factor >= 1):
        found.append(f"the factor of rope_type {kind} must be at least 1, not {rope.factor!r}")
    if kind == "llama3" and not (rope.high_freq_factor > rope.low_freq_factor and original > 0):
        found.append("rope_type llama3 needs high_freq_factor > low_freq_factor and original_max_position_embeddings > 0")
    if kind == "yarn" and not (rope.beta_fast >= rope.beta_slow > 0 and original > 0 and rope.rope_theta > 1):
        found.append("rope_type yarn needs beta_fast >= beta_slow > 0, original_max_position_embeddings > 0 and rope_theta > 1")
    return found


def not_positive(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return a complaint for each name whose value is not a positive integer."""
    return [f"{name} must be a positive integer, not {values[name]!r}" for name in names if not _is_positive(values[name])]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _bad_choice(name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{name} {value!r} is not supported; one of {', '.join(choices)} is"]
