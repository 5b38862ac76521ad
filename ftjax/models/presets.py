"""Known architectures by name, as their publishers' `config.json` gives them: to build, count and compile without a download."""

from __future__ import annotations

from typing import Any

from ftjax import tree
from ftjax.models.config import Config
from ftjax.models.hf_config import config_from_hf


def _sizes(hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    context = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **context}


_BF16 = {"torch_dtype": "bfloat16"}
_LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "torch_dtype": "float16"}
_LLAMA3 = {
    **_BF16,
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA31 = {**_LLAMA3, "max_position_embeddings": 131072, "rope_scaling": _llama3_rope(8.0)}
_LLAMA32 = {**_LLAMA31, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
_SMOLLM2 = {
    **_BF16,
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_MISTRAL = {**_BF16, "model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_QWEN2 = {**_BF16, "model_type": "qwen2", "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151643}
_QWEN3 = {
    **_BF16,
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_GEMMA2 = {**_BF16, "model_type": "gemma2"}
_GEMMA3 = {**_BF16, "model_type": "gemma3_text", "eos_token_id": [1, 106]}
_LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0}

_TINY = {"vocab_size": 260, "max_position_embeddings": 512, **_sizes(32, 64, 2, 4, 2)}
_TINY_GEMMA = {**_TINY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "bos_token_id": None, "pad_token_id": None}

PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_LLAMA2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-65b": {**_LLAMA2, **_sizes(8192, 22016, 80, 64, 64), "max_position_embeddings": 2048},
    "llama-3-8b": {**_LLAMA3, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3.1-8b": {**_LLAMA31, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3.1-70b": {**_LLAMA31, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3.2-1b": {**_LLAMA32, **_sizes(2048, 8192, 16, 32, 8)},
    "llama-3.2-3b": {**_LLAMA32, **_sizes(3072, 8192, 28, 24, 8)},
    "smollm2-135m": {**_SMOLLM2, **_sizes(576, 1536, 30, 9, 3)},
    "smollm2-360m": {**_SMOLLM2, **_sizes(960, 2560, 32, 15, 5)},
    "mistral-7b": {**_MISTRAL, **_sizes(4096, 14336, 32, 32, 8), "vocab_size": 32000, "sliding_window": 4096},
    "mistral-7b-v0.3": {**_MISTRAL, **_sizes(4096, 14336, 32, 32, 8), "vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6},
    "qwen2.5-0.5b": {**_QWEN2, **_sizes(896, 4864, 24, 14, 2), "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "qwen2.5-7b": {**_QWEN2, **_sizes(3584, 18944, 28, 28, 4), "vocab_size": 152064, "max_position_embeddings": 131072},
    "qwen3-0.6b": {**_QWEN3, **_sizes(1024, 3072, 28, 16, 8), "tie_word_embeddings": True},
    "qwen3-4b": {**_QWEN3, **_sizes(2560, 9728, 36, 32, 8), "tie_word_embeddings": True},
    "qwen3-8b": {**_QWEN3, **_sizes(4096, 12288, 36, 32, 8)},
    "gemma-2-2b": {**_GEMMA2, **_sizes(2304, 9216, 26, 8, 4)},
    "gemma-3-1b": {
        **_GEMMA3,
        **_sizes(1152, 6912, 26, 4, 1),
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
    },
    "gemma-3-4b": {**_GEMMA3, **_sizes(2560, 10240, 34, 8, 4), "sliding_window": 1024, "rope_scaling": _LINEAR_ROPE},
    "tiny-llama": {**_TINY, "model_type": "llama", "tie_word_embeddings": True},
    "tiny-mistral": {**_TINY, "model_type": "mistral", "sliding_window": 8},
    "tiny-qwen2": {**_TINY, "model_type": "qwen2", "tie_word_embeddings": True},
    "tiny-qwen3": {**_TINY, "model_type": "qwen3", "head_dim": 8},
    "tiny-gemma2": {**_TINY_GEMMA, "model_type": "gemma2"},
    "tiny-gemma3": {**_TINY_GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 3},
}
"""Name -> `config.json`. The `tiny-*` are for tests: every option of their family at work, vocabulary 260 (see the byte tokenizer)."""


def preset(name: str) -> Config:
    """Return the architecture of a known checkpoint.

    Raises:
      ValueError: there is no such name; the nearest are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"models: there is no preset {name!r}; nearest: {tree.nearest(name, PRESETS)}.")
    return config_from_hf(PRESETS[name])
