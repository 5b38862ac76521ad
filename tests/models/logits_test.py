"""Our logits are those of transformers, for every family; goldens by `third_party/transformers/logits.py`."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import safetensors

from ftjax import models
from ftjax.hf import folder, lazy, load

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CASES = ["llama", "llama_biased", "mistral", "qwen2", "qwen2_sliding", "qwen2_yarn", "qwen3", "gemma2", "gemma3"]
TOLERANCE = 1e-5  # relative to the largest logit; float32 sums in another order


def golden(case):
    """Return `(config.json, params of a model, tokens, logits)`."""
    path = GOLDENS / f"logits_{case}.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tokens, logits = tensors.pop("tokens"), tensors.pop("logits")
    checkpoint = folder.Checkpoint(path, config, {name: lazy.from_array(tensor) for name, tensor in tensors.items()})
    model = models.build(models.config_from_hf(config))
    return config, model, load.load_params(checkpoint, model), jnp.asarray(tokens), jnp.asarray(logits)


def error(model, params, tokens, logits):
    hidden, _ = jax.jit(model.apply)(params, tokens)
    return float(jnp.max(jnp.abs(model.unembed(model.head(params), hidden) - logits)) / jnp.max(jnp.abs(logits)))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    _, model, params, tokens, logits = golden(case)
    assert error(model, params, tokens, logits) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "option", "value"),
    [
        ("llama", "rope_parameters", {"rope_theta": 100.0}),
        ("qwen2_yarn", "rope_parameters", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10.0}),
        ("mistral", "sliding_window", 6),
        ("qwen2_sliding", "layer_types", ["full_attention", "full_attention"]),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "query_pre_attn_scalar", 8),
        ("gemma2", "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
        ("gemma3", "rope_parameters", {"full_attention": {"rope_theta": 1000.0}, "sliding_attention": {"rope_theta": 10.0}}),
        ("gemma3", "rope_parameters", {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}),
    ],
)
def test_every_option_matters(case, option, value):
    config, _, params, tokens, logits = golden(case)
    changed = models.build(models.config_from_hf({**config, option: value}))
    assert error(changed, params, tokens, logits) > 100 * TOLERANCE
