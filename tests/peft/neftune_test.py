import jax
import jax.numpy as jnp
import numpy as np

from ftjax import peft, weights
from tests import toy


def test_noise_is_bounded_as_in_the_paper_and_comes_with_a_key_only(key):
    params = toy.init(key)
    method = peft.neftune(alpha=5.0)
    frozen, trainable = method.init(key, params)
    ids = jnp.zeros((3, 400), jnp.int32)
    clean = weights.embed(ids, params["embed_tokens"]["kernel"])
    silent = weights.embed(ids, method.attach(frozen, trainable)["embed_tokens"]["kernel"])
    noise = weights.embed(ids, method.attach(frozen, trainable, key=key)["embed_tokens"]["kernel"]) - clean
    np.testing.assert_array_equal(silent, clean)
    bound = 5.0 / np.sqrt(400 * toy.DIM)
    assert 0.98 * bound < float(jnp.abs(noise).max()) <= bound * (1 + 1e-3)
    assert abs(float(noise.mean())) < 0.03 * bound
    assert trainable == {}


def test_a_tied_head_hears_no_noise(key):
    params = toy.init(key)
    method = peft.neftune()
    noisy = method.attach(*method.init(key, params), key=key)
    hidden = jax.random.normal(key, (2, toy.DIM))
    np.testing.assert_array_equal(toy.unembed(toy.head(noisy), hidden), toy.unembed(toy.head(params), hidden))
