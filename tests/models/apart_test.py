"""Layers that lie apart are the stacked ones."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, weights
from ftjax.models.apart import Turned
from tests import toy
from tests.rollout.generate_test import tiny

APART = sys.modules[models.apart.__module__]


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
    np.testing.assert_allclose(jnp.stack(found.k), filled.k, atol=1e-5)
    np.testing.assert_allclose(jnp.stack(found.v), filled.v, atol=1e-5)
    assert float(jnp.abs(filled.k).max()) > 0.1


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 8), (17,)], ids=str)
def test_a_turned_matrix_multiplies_as_it_stands_for(rows, key):
    array, x = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(jax.random.split(key), ((24, 40), (*rows, 24)), strict=True))
    turned = Turned(array.T)
    assert turned.shape == array.shape and turned.dtype == array.dtype
    np.testing.assert_array_equal(turned.materialize(), array)
    y, exact = x @ array, np.asarray(array, np.float64)
    products = (
        (weights.dot(x, turned), np.asarray(x, np.float64) @ exact),
        (weights.dot_transposed(y, turned), np.asarray(y, np.float64) @ exact.T),
    )
    for found, against in products:
        assert found.dtype == jnp.bfloat16 and found.shape == against.shape
        np.testing.assert_allclose(np.asarray(found, np.float64), against, rtol=2**-8, atol=2**-8 * np.abs(against).max())


def test_matrices_in_half_precision_are_turned_also_under_an_adapter(key, monkeypatch):
    monkeypatch.setattr(APART, "TURNS", True)
    model, params = tiny()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    method = peft.lora(["q_proj"], rank=2)
    params = method.attach(*method.init(key, params))
    first, *_ = models.apart(params)["layers"]
    assert isinstance(first["self_attn"]["q_proj"]["kernel"].base, Turned) and isinstance(first["mlp"]["up_proj"]["kernel"], Turned)
    dense, stacked = weights.dense(first), weights.dense(params["layers"])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), dense, stacked)
    tokens = jax.random.randint(key, (2, 5), 0, model.config.vocab_size)
    hidden, other = (np.asarray(jax.jit(model.apply)(p, tokens)[0], np.float64) for p in (params, models.apart(params)))
    np.testing.assert_allclose(other, hidden, atol=2**-5 * np.abs(hidden).max())
    assert np.abs(hidden).max() > 0.1


def test_each_layer_lies_where_it_lay_and_hinders_nobody_afterwards(key):
    """No second copy of a model in float32; and who trains it may write over it when the views are gone."""
    params = tiny()[0].init(key)
    layers = models.apart(params)["layers"]
    for at, layer in enumerate(layers):
        for stacked, view in zip(jax.tree.leaves(params["layers"]), jax.tree.leaves(layer), strict=True):
            np.testing.assert_array_equal(view, stacked[at])
            assert view.unsafe_buffer_pointer() - stacked.unsafe_buffer_pointer() == at * view.nbytes
    del layers, layer, view, stacked
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params["layers"])]
    params = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)(params)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params["layers"])] == places


def test_an_array_that_xla_cannot_read_where_it_lies_is_copied(key):
    model, params = tiny()
    odd = jax.random.normal(key, (model.config.num_hidden_layers, 3))
    layers = models.apart({"layers": {**params["layers"], "odd": odd}})["layers"]
    np.testing.assert_array_equal(jnp.stack([layer["odd"] for layer in layers]), odd)


def test_matrices_that_take_much_memory_are_not_turned(key, monkeypatch):
    _, params = tiny()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    monkeypatch.setattr(APART, "TURNS", True)
    count = models.turned_bytes(params)
    assert count == sum(2 * x.size for part in ("self_attn", "mlp") for x in jax.tree.leaves(params["layers"][part]))
    monkeypatch.setattr(APART, "TURNED_BYTES", count - 1)
    assert models.turned_bytes(params) == 0
    first, *_ = models.apart(params)["layers"]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), first, params["layers"])


def test_a_model_that_is_none_of_ours_or_has_fewer_layers_is_left_alone(key):
    model, params = tiny()
    assert not models.separable(toy.MODEL, toy.init(key))
    twice = model._replace(config=dataclasses.replace(model.config, num_hidden_layers=2 * model.config.num_hidden_layers))
    assert not models.separable(twice, params)
