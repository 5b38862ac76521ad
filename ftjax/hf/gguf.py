"""A GGUF file as a checkpoint: metadata as a Hugging Face config, blocks dequantised tensor by tensor as they are read.

llama.cpp's converter renames tensors, reorders the rows of llama's q and k projections (it rotates neighbouring channels where Hugging
Face rotates halves), and stores Gemma's norms plus one. All of that is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ftjax.hf import gguf_file
from ftjax.hf.folder import Checkpoint
from ftjax.hf.gguf_file import File, Packed
from ftjax.hf.lazy import Index, LazyTensor
from ftjax.tree import nearest

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""GGUF architecture -> Hugging Face model type and class. Mistral files say `llama`."""

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INNER_GEMMA = _INNER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read(path: Path, file: File | None = None) -> Checkpoint:
    """Return the checkpoint in a GGUF file.

    Args:
      path: the file.
      file: `gguf_file.open_file(path)`, if the caller has it already.

    Raises:
      ValueError: the file is malformed, or of an architecture, block type or RoPE scaling that is not supported.
    """
    meta, packed = file or gguf_file.open_file(path)
    architecture = meta.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"gguf: {path}: architecture {architecture!r} is not supported; nearest: {nearest(architecture, ARCHITECTURES)}.")
    try:
        config = config_dict(meta, packed)
    except KeyError as error:
        raise ValueError(f"gguf: {path}: the metadata lack {error}") from error
    tensors = {}
    for name, tensor in packed.items():
        if name != "rope_freqs.weight":  # Llama 3's RoPE scaling, which the config expresses
            tensors[hf_name(name, architecture)] = _tensor(name, tensor, architecture, config)
    return Checkpoint(path, config, tensors)


def hf_name(name: str, architecture: str) -> str:
    """Return the Hugging Face name of a GGUF tensor, or the name itself if it is unknown (the loader will list it)."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    inner = _INNER_GEMMA if architecture.startswith("gemma") else _INNER
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if block and block[2] in inner:
        return f"model.layers.{block[1]}.{inner[block[2]]}.{leaf}"
    return name


def config_dict(meta: Mapping[str, Any], packed: Mapping[str, Packed]) -> dict[str, Any]:
    """Return the `config.json` that a GGUF file's metadata and tensor list amount to."""
    architecture = meta["general.architecture"]
    model_type, model_class = ARCHITECTURES[architecture]

    def get(key: str, *default: Any) -> Any:
        return meta.get(f"{architecture}.{key}", *default) if default else meta[f"{architecture}.{key}"]

    heads, width = get("attention.head_count"), get("embedding_length")
    config = {
        "model_type": model_type,
        "architectures": [model_class],
        "vocab_size": packed["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "output.weight" not in packed,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    scaling = _rope_scaling(get, packed, config)
    if scaling:
        config["rope_scaling"] = scaling
    if architecture.startswith("gemma"):
        return config | _gemma(architecture, get, config)
    if architecture != "qwen2":  # whose q, k, v always have a bias
        config["attention_bias"] = "blk.0.attn_q.bias" in packed
    return config | {"hidden_act": "silu"}


def _gemma(architecture: str, get: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    # llama.cpp knows by the number of layers that the 27B models scale queries by hidden_size / heads and the others by head_dim.
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    common = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": get("attention.sliding_window", 4096),
    }
    if architecture == "gemma3":
        return common | {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    return common | {
        "attn_logit_softcapping": _decimal(get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _decimal(get("final_logit_softcapping", 30.0)),
    }


def _rope_scaling(get: Any, packed: Mapping[str, Packed], config: Mapping[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in packed:
        return _llama3_scaling(packed["rope_freqs.weight"].rows.view(np.float32), config)
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(f"gguf: not yet: RoPE scaling of type {kind!r}; supported: 'linear' and Llama 3's")
    return {"rope_type": "linear", "factor": _decimal(get("rope.scaling.factor"))}


def _llama3_scaling(divisors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Llama 3's scaling, whose parameters the file does not state: its divisors of the frequencies must be what they give."""
    low, high, original, factor = 1.0, 4.0, 8192, round(float(divisors.max()), 3)
    frequencies = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ValueError("gguf: not yet: rope_freqs.weight holds frequency factors that are not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _decimal(value: float) -> float:
    """Return the decimal that was meant by a float32: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _tensor(name: str, packed: Packed, architecture: str, config: Mapping[str, Any]) -> LazyTensor:
    rows = packed.rows
    if architecture == "llama" and re.search(r"\.attn_[qk]\.", name):
        rows = _halves(rows, config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"])
    offset = np.float32(1.0 if architecture.startswith("gemma") and "norm" in name else 0.0)

    def fetch(index: Index) -> np.ndarray:
        try:
            block = gguf.quants.dequantize(np.ascontiguousarray(rows[index[0]]), packed.kind)
        except NotImplementedError as error:
            raise ValueError(f"gguf: tensor {name!r} has block type {packed.kind.name}, which gguf cannot dequantise") from error
        return block[(slice(None), *index[1:])] - offset if offset else block[(slice(None), *index[1:])]

    return LazyTensor(packed.shape, np.dtype(np.float32), fetch)


def _halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Return rows whose rotated pairs are neighbours within a head with those pairs half a head apart; whole rows move, still packed."""
    pairs = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
