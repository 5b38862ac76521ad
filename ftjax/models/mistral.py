"""Mistral: a Llama whose layers see a sliding window, or everything where that is null (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from ftjax.models import llama

FAMILY = llama.FAMILY._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer_types=lambda raw: ("sliding_attention" if raw["sliding_window"] else "full_attention",) * raw["num_hidden_layers"],
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
)
