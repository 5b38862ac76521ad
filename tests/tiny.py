"""A Llama of two layers with the vocabulary of `tests.toy`, in the same form: for what needs attention."""

import jax

from ftjax import models
from tests import toy

MODEL = models.build(
    models.config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": toy.VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
        }
    )
)
init, apply = jax.jit(MODEL.init), MODEL.apply
