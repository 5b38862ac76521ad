"""Qwen 2 and 2.5: a Llama whose queries, keys and values add a bias (Yang et al. 2024, arXiv:2407.10671; arXiv:2412.15115)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.models import llama


def layer_types(raw: Mapping[str, Any]) -> Sequence[str]:
    """Return the layers' types: with `use_sliding_window`, those from `max_window_layers` on slide."""
    first_sliding = raw["max_window_layers"] if raw["use_sliding_window"] and raw["sliding_window"] else raw["num_hidden_layers"]
    return tuple("sliding_attention" if i >= first_sliding else "full_attention" for i in range(raw["num_hidden_layers"]))


FAMILY = llama.FAMILY._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=functools.partial(llama.Layer, biases="qkv"),
    layer_types=layer_types,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    },
)
