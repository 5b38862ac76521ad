"""A packed matrix multiplies as the dense one that it stands for, forwards and backwards, and nothing dense is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import weights
from ftjax.kernels.int4_matmul import reference
from ftjax.quant import SPECS, quantize

FORMATS = list(SPECS)
formats = pytest.mark.parametrize("format", FORMATS)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@formats
@pytest.mark.parametrize(
    ("group", "tile"),
    [(64, 2**20), (32, 192 * 64), (None, 192 * 8)],
    ids=["one tile", "tiles on both axes, the last ragged", "tiles narrower than a group"],
)
def test_both_products_and_their_gradients_are_those_of_the_matrix(format, group, tile, key, monkeypatch):
    monkeypatch.setattr(reference, "TILE", tile)
    w = quantize(jax.random.normal(key, (192, 100)), format, group=group)
    dense = np.asarray(w.materialize(), np.float64)
    x, y = jax.random.normal(key, (3, 5, 192)), jax.random.normal(jax.random.fold_in(key, 1), (3, 5, 100))
    assert relative(weights.dot(x, w), x @ dense) < 1e-5
    assert relative(weights.dot_transposed(y, w), y @ dense.T) < 1e-5
    gradient = jax.grad(lambda x: jnp.sum(y * weights.dot(x, w)))(x)
    transposed = jax.grad(lambda y: jnp.sum(x * weights.dot_transposed(y, w)))(y)
    assert relative(gradient, y @ dense.T) < 1e-5 and relative(transposed, x @ dense) < 1e-5


@formats
def test_bfloat16_is_rounded_once(format, key):
    w = quantize(jax.random.normal(key, (128, 48), jnp.bfloat16), format)
    x = jax.random.normal(key, (7, 128), jnp.bfloat16)
    assert w.dtype == jnp.bfloat16 and weights.dot(x, w).dtype == jnp.bfloat16
    np.testing.assert_array_equal(weights.dot(x, w), weights.dot(x, w.materialize()))
    assert relative(weights.dot(x, w), np.asarray(x, np.float64) @ np.asarray(w.materialize(), np.float64)) < 1e-2


@formats
def test_rows_are_those_of_the_matrix(format, key):
    w = quantize(jax.random.normal(key, (128, 6)), format, group=32)
    ids = jax.random.randint(key, (2, 40), 0, 128)
    np.testing.assert_array_equal(weights.embed(ids, w), w.materialize()[ids])


@formats
def test_the_backward_pass_keeps_packed_arrays_only(format, key):
    """Through a scan over layers that are computed again, as in a model."""
    stack = quantize(0.1 * jax.random.normal(key, (3, 128, 128)), format, nested=True)

    def loss(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(weights.dot(x, w)), None)), x, stack)[0])

    x = jnp.ones((4, 128))
    _, pullback = jax.vjp(loss, x)
    floats = [leaf.size for leaf in jax.tree.leaves(pullback) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(floats) < 128 * 128
    dense = stack.materialize()
    expected = jax.grad(lambda x: jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(weights.dot(x, w)), None), x, dense)[0]))(x)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-5)


def test_no_dense_matrix_exists_while_it_multiplies(key):
    w = jax.eval_shape(lambda w: quantize(w, "nf4", nested=True), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    for product in (weights.dot, lambda x, w: jax.grad(lambda x: jnp.sum(weights.dot(x, w).astype(jnp.float32)))(x)):
        memory = jax.jit(product).lower(x, w).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4096 * 4096 * 2 / 2  # half of it in bfloat16
