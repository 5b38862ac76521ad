import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import weights
from ftjax.types import pytree
from ftjax.weights import Weight


@pytree
class Doubled(Weight):
    """`materialize() == 2 * half`; implements nothing beyond what is abstract."""

    half: jax.Array

    @property
    def shape(self):
        return self.half.shape

    @property
    def dtype(self):
        return self.half.dtype

    def materialize(self):
        return 2 * self.half


@pytest.fixture
def w(key):
    return jax.random.normal(key, (4, 3))


def test_the_defaults_of_a_weight_follow_from_materialize(key, w):
    x, y, ids = jax.random.normal(key, (2, 5, 4)), jax.random.normal(key, (2, 5, 3)), jnp.array([[0, 3], [1, 1]])
    np.testing.assert_allclose(weights.dot(x, Doubled(w)), x @ (2 * w), rtol=1e-6)
    np.testing.assert_allclose(weights.dot_transposed(y, Doubled(w)), y @ (2 * w).T, rtol=1e-6)
    np.testing.assert_array_equal(weights.embed(ids, Doubled(w)), (2 * w)[ids])
    for got, expected in zip(weights.dots(x, [w, Doubled(w)]), (x @ w, x @ (2 * w)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_dot_keeps_the_dtype_of_x(key, w):
    x = jax.random.normal(key, (2, 4), jnp.bfloat16)
    assert weights.dot(x, w).dtype == weights.dot(x, Doubled(w)).dtype == jnp.bfloat16


def test_multiplying_with_an_operator_raises_and_names_dot(w):
    for wrong in (lambda: w.T @ Doubled(w), lambda: Doubled(w) @ w.T, lambda: w * Doubled(w)):
        with pytest.raises(TypeError, match=r"ftjax\.weights\.dot"):
            wrong()


def test_a_weight_passes_through_scan_layer_by_layer(key):
    stack = jax.random.normal(key, (5, 3, 3))
    x = jnp.ones((2, 3))
    scanned, _ = jax.lax.scan(lambda x, w: (weights.dot(x, w), None), x, Doubled(stack))
    for layer in stack:
        x = x @ (2 * layer)
    np.testing.assert_allclose(scanned, x, rtol=1e-5)


def test_dense_materializes_every_weight_and_keeps_arrays(w):
    params = {"a": Doubled(w), "b": w}
    dense = weights.dense(params)
    np.testing.assert_array_equal(dense["a"], 2 * w)
    assert dense["b"] is w
