"""A matrix whose rows are grouped out of order multiplies as the dense one."""

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import weights
from ftjax.quant import quantize
from ftjax.quant.permuted import PermutedWeight

IDS = jnp.array([3, 0, 15])


@jax.jit
def outcomes(leaf, x, y):
    """Products both ways, their gradients, and rows."""
    back, forward = (jax.grad(lambda a, f=f: jnp.sum(jnp.sin(f(a, leaf)))) for f in (weights.dot_transposed, weights.dot))
    return weights.dot(x, leaf), weights.dot_transposed(y, leaf), weights.embed(IDS, leaf), forward(x), back(y)


def test_products_rows_and_gradients_are_those_of_the_dense_matrix(key):
    orders = jnp.stack([jax.random.permutation(jax.random.fold_in(key, layer), 16) for layer in range(2)])
    stack = PermutedWeight(quantize(jax.random.normal(key, (2, 16, 6)), "int4", group=8), orders)
    dense, sorted_ = stack.materialize(), stack.base.materialize()
    x, y = jax.random.normal(key, (2, 3, 16)), jax.random.normal(key, (2, 3, 6))
    for layer in range(2):
        np.testing.assert_array_equal(dense[layer][orders[layer]], sorted_[layer])
        one = jax.tree.map(lambda array, layer=layer: array[layer], stack)
        for found, expected in zip(outcomes(one, x, y), outcomes(dense[layer], x, y), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
