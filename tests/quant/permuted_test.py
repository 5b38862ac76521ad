"""A matrix whose rows are grouped out of order multiplies as the dense one."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax import sharding, weights
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


MESHED = {  # how [192, 64] is split, its groups, and what devices say to each other, forwards and backwards, of [2, 3, …] rows of their own
    "by columns": ((None, "tensor"), 32, {"192 all-reduce": 1}),
    "by rows": (("tensor", None), 32, {"192 all-gather": 2, "64 all-reduce": 1}),
    "by rows, of one group": (("tensor", None), None, {"192 all-gather": 2, "64 all-reduce": 1}),
    "by rows, of three groups": (("tensor", None), 64, {"192 all-gather": 1}),
}


@pytest.mark.parametrize(("dense", "group", "expected_words"), MESHED.values(), ids=MESHED)
def test_eight_devices_equal_one_and_gather_inputs_over_tensor_alone(dense, group, expected_words, key):
    """Where rows are split a device may need any input: they are gathered, and not added up or scattered."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    w = PermutedWeight(quantize(jax.random.normal(key, (192, 64)), "uint4", group=group), jax.random.permutation(key, 192))
    there = w.on_mesh(mesh, sharding.ROWS, dense)
    assert there.base.place == (mesh, sharding.ROWS, *dense)
    wide, tall = (NamedSharding(mesh, P(sharding.ROWS, None, entry)) for entry in dense)
    x, y = (jax.random.normal(jax.random.fold_in(key, n), (8, 3, size)) for n, size in enumerate((192, 64)))

    def both(x, y, w):
        out, pullback = jax.vjp(lambda x: weights.dot(x, w), x)
        return out, pullback(y)[0]

    program = jax.jit(both, in_shardings=(wide, tall, None), out_shardings=(tall, wide)).lower(x, y, there).compile()
    found = program(jax.device_put(x, wide), jax.device_put(y, tall), there)
    for one, two in zip(found, both(x, y, w), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4)
    words = re.findall(r"f32\[2,3,(\d+)\]\S* (all-\S+|collective-permute|scatter)\(", program.as_text())
    assert collections.Counter(map(" ".join, words)) == expected_words
