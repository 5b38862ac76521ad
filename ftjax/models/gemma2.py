"""Gemma 2: norms before and after each half of a layer, capped scores and logits, every other layer with a window (arXiv:2408.00118)."""

from __future__ import annotations

import jax
from flax import nnx

from ftjax.models import layers
from ftjax.models.config import Config
from ftjax.models.decoder import Family

NORM_CENTER = 1.0
"""Gemma stores `scale - 1`."""


class Layer(nnx.Module):
    """`x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))`."""

    def __init__(self, config: Config, *, qk_norm_center: float | None = None, rngs: nnx.Rngs):
        biases = "qkvo" if config.attention_bias else ""
        self.input_layernorm = layers.RMSNorm(config.hidden_size, config, center=NORM_CENTER)
        self.self_attn = layers.Attention(config, biases=biases, qk_norm_center=qk_norm_center, rngs=rngs)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, config, center=NORM_CENTER)
        self.pre_feedforward_layernorm = layers.RMSNorm(config.hidden_size, config, center=NORM_CENTER)
        self.mlp = layers.MLP(config, rngs=rngs)
        self.post_feedforward_layernorm = layers.RMSNorm(config.hidden_size, config, center=NORM_CENTER)

    def __call__(self, x: jax.Array, scene: layers.Scene, cached: layers.KeysValues):
        y, cached = self.self_attn(self.input_layernorm(x), scene, cached)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x), scene)
        return x + self.post_feedforward_layernorm(y), cached


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    layer=Layer,
    norm_center=NORM_CENTER,
    embedding_scale=lambda config: config.hidden_size**0.5,
    layer_types=lambda raw: tuple("full_attention" if i % 2 else "sliding_attention" for i in range(raw["num_hidden_layers"])),
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "layer_types": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
)
