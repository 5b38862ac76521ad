"""Llama: normalise, attend, add; normalise, feed forward, add (Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783).

SmolLM2 and many others are Llamas in all but name.
"""

from __future__ import annotations

import jax
from flax import nnx

from ftjax.models import layers
from ftjax.models.config import Config
from ftjax.models.decoder import Family


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: Config, *, biases: str | None = None, qk_norm_center: float | None = None, rngs: nnx.Rngs):
        biases = ("qkvo" if config.attention_bias else "") if biases is None else biases
        self.input_layernorm = layers.RMSNorm(config.hidden_size, config)
        self.self_attn = layers.Attention(config, biases=biases, qk_norm_center=qk_norm_center, rngs=rngs)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, config)
        self.mlp = layers.MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, scene: layers.Scene, cached: layers.KeysValues):
        y, cached = self.self_attn(self.input_layernorm(x), scene, cached)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), scene), cached


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=Layer,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
)
