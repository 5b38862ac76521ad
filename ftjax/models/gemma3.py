"""Gemma 3, its text model: Gemma 2 with normalised queries and keys, and five sliding layers, of another rotary base, to a full one.

Gemma team 2025, arXiv:2503.19786. The caps of Gemma 2 are gone, but a checkpoint that sets them is understood.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.models import gemma2


def layer_types(raw: Mapping[str, Any]) -> Sequence[str]:
    """Return the layers' types: every `sliding_window_pattern`-th sees everything."""
    pattern = raw["sliding_window_pattern"]
    return tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(raw["num_hidden_layers"]))


FAMILY = gemma2.FAMILY._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    layer=functools.partial(gemma2.Layer, qk_norm_center=gemma2.NORM_CENTER),
    layer_types=layer_types,
    defaults={
        **gemma2.FAMILY.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    },
)
