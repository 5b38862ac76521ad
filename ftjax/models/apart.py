"""Layers that lie apart: a tree for each, and an array of the cache for each, where stacked ones are the rule.

A scan takes a layer's slice of what is stacked. XLA reads it in place on accelerators and copies it on a CPU: of no consequence for many
tokens, but a step of decoding does little more with a matrix, or with the keys and values before it, than to read them once. So what
writes many tokens on a CPU lays the layers apart first, once, and the decoder goes through them one by one. Matrices in half precision are
laid turned, as such a product reads them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.kernels.product import product
from ftjax.models.cache import Cache
from ftjax.models.config import Config
from ftjax.types import Model, Params, pytree

FEW = 16
"""Rows up to which a product has the matrix on its left."""


@pytree
class Turned(weights.Weight):
    """A matrix stored as its transpose, `[o, i]`.

    For a product of few rows XLA:CPU first copies the matrix on its right, and is faster at that where the sums go along its rows; the one
    on its left it reads as it lies. The products of SmolLM2-135M's MLPs in bfloat16, on two cores, for 4, 16 and 64 rows: 20, 23 and 28 ms
    with the matrix as it is, 14, 18 and 23 turned, 9, 13 and 23 turned and on the left.
    """

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        *stacked, o, i = self.array.shape
        return (*stacked, i, o)

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype

    def materialize(self) -> jax.Array:
        return jnp.swapaxes(self.array, -1, -2)

    def dot(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count > FEW:
            return product(x, self.array, True)
        # One row would be a product of a matrix and a vector, which XLA:CPU takes ten times as long for in half precision.
        rows = jnp.broadcast_to(rows, (max(count, 2), rows.shape[-1]))
        out = jax.lax.dot_general(self.array.astype(x.dtype), rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        out = jax.lax.optimization_barrier(out).T  # without the barrier the compiler puts the matrix on the right again
        return out[:count].astype(x.dtype).reshape(*x.shape[:-1], -1)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return product(x, self.array)


def separable(model: Model, params: Params) -> bool:
    """Return whether the layers may lie apart: of a family of ours, whose parameters are all stacked."""
    if not isinstance(model.config, Config) or not isinstance(params.get("layers"), dict):
        return False
    return all(jnp.shape(x)[:1] == (model.config.num_hidden_layers,) for x in jax.tree.leaves(params["layers"]))


def apart(params: Params) -> Params:
    """Return the parameters with a tuple of trees in the place of the stacked layers."""
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = (tree.flatten(jax.tree.map(lambda x, at=at: x[at], params["layers"])) for at in range(count))
    matrix = tree.predicate(tree.ALL_LINEAR)
    turned = ({path: _turned(leaf) if matrix(f"layers/{path}") else leaf for path, leaf in layer.items()} for layer in layers)
    return {**params, "layers": tuple(map(tree.unflatten, turned))}


def _turned(leaf: weights.Leaf) -> weights.Leaf:
    """Return a leaf with the dense matrix in half precision that it is, or rides on, turned."""
    if isinstance(leaf, weights.Wrapper):
        return dataclasses.replace(leaf, base=_turned(leaf.base))
    half = isinstance(leaf, jax.Array) and jnp.dtype(leaf.dtype).itemsize == 2
    return Turned(leaf.T) if half else leaf


def apart_cache(cache: Cache) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the keys and values with an array `[1, b, k, s, c]` for each layer."""
    return tuple(tuple(x[at : at + 1] for at in range(len(x))) for x in (cache.k, cache.v))
