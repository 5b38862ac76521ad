"""Known architectures by name, as their publishers' `config.json` gives them: to build, count and compile without a download."""

from __future__ import annotations

from typing import Any

from ftjax import tree
from ftjax.models.config import Config
from ftjax.models.hf_config import config_from_hf

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_8B = {
    **_LLAMA3,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}

PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {**_LLAMA_8B, "max_position_embeddings": 8192},
    "llama-3.1-8b": {**_LLAMA_8B, "max_position_embeddings": 131072, "rope_scaling": _LLAMA3_ROPE},
    "smollm2-135m": {
        **_SMOLLM2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny-llama": {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
"""Name -> `config.json`."""


def preset(name: str) -> Config:
    """Return the architecture of a known checkpoint.

    Raises:
      ValueError: there is no such name; the nearest are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"models: there is no preset {name!r}; nearest: {tree.nearest(name, PRESETS)}.")
    return config_from_hf(PRESETS[name])
