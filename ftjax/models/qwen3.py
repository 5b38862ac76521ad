"""Qwen 3: a Llama that normalises each query and key head (Yang et al. 2025, arXiv:2505.09388, section 2)."""

from __future__ import annotations

import functools

from ftjax.models import llama, qwen2

FAMILY = llama.FAMILY._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=functools.partial(llama.Layer, qk_norm_center=0.0),
    layer_types=qwen2.layer_types,
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128, "attention_bias": False},
)
