"""Layers that lie apart are the stacked ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft
from tests import toy
from tests.rollout.generate_test import tiny


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_says_the_same_with_and_without_a_cache(family, key):
    model, params = tiny(family)
    method = peft.lora("all-linear", rank=2, init="gaussian")
    frozen, trainable = method.init(key, params)
    params = method.attach(frozen, jax.tree.map(lambda x: x + 0.05, trainable))
    tokens = jax.random.randint(key, (2, 5), 0, model.config.vocab_size)
    cache = models.init_cache(model.config, 2, 8)
    k, v = models.apart_cache(cache)
    lying = dataclasses.replace(cache, k=k, v=v)
    assert models.separable(model, params) and len(k) == model.config.num_hidden_layers
    for stacked, separate in ((None, None), (cache, lying)):
        hidden, filled = jax.jit(model.apply)(params, tokens, cache=stacked)
        other, found = jax.jit(model.apply)(models.apart(params), tokens, cache=separate)
        np.testing.assert_allclose(other, hidden, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(found.k), filled.k, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(found.v), filled.v, atol=1e-5)
    assert float(jnp.abs(filled.k).max()) > 0.1


def test_a_model_that_is_none_of_ours_or_has_fewer_layers_is_left_alone(key):
    model, params = tiny()
    assert not models.separable(toy.MODEL, toy.init(key))
    twice = model._replace(config=dataclasses.replace(model.config, num_hidden_layers=2 * model.config.num_hidden_layers))
    assert not models.separable(twice, params)
