"""Layers that lie apart: a tree for each, and an array of the cache for each, where stacked ones are the rule.

A scan takes a layer's slice of what is stacked. XLA reads it in place on accelerators and copies it on a CPU: of no consequence for many
tokens, but a step of decoding does little more with a matrix, or with the keys and values before it, than to read them once. So what
writes many tokens on a CPU lays the layers apart first, once, and the decoder goes through them one by one. Each layer's arrays are views
of the stacked ones, without a byte of their own; only matrices in half precision are copied, turned as such a product reads them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree, weights
from ftjax.kernels.product import product
from ftjax.models.cache import Cache
from ftjax.models.config import Config
from ftjax.types import Model, Params, pytree

FEW = 16
"""Rows up to which a product has the matrix on its left."""
TURNS = jax.__version_info__ >= (0, 12)
"""JAX 0.10 turns them back for products of many rows, at every call anew, so that nothing is gained."""
TURNED_BYTES = 2**28
"""Matrices that take more in all are not turned, for it needs as much again: those of SmolLM2-135M take 212 MB."""


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
    """Return the parameters, which lie on a CPU, with a tuple of trees in the place of the stacked layers.

    While they live the stacked arrays, whose memory they share, cannot be donated.
    """
    layers = _turned(params["layers"]) if turned_bytes(params) else params["layers"]
    views, structure = [_views(x) for x in jax.tree.leaves(layers)], jax.tree.structure(layers)
    return {**params, "layers": tuple(map(structure.unflatten, zip(*views, strict=True)))}


def turned_bytes(params: Params) -> int:
    """Return what `apart` takes: the bytes of the layers' dense matrices in half precision, 0 where they are not turned."""
    count = sum(tree.num_bytes(base) for base in map(_half, _matrices(params["layers"]).values()) if base is not None)
    return count if TURNS and count <= TURNED_BYTES else 0


def _views(x: jax.Array) -> list[jax.Array]:
    """Return the layers of a stacked array, each where it lies (or a copy, if it begins at an address that XLA cannot read from)."""
    x = jax.device_put(x, may_alias=True)  # an array of its own, since the one that a host looks into keeps what it sees
    (device,) = x.devices()
    return [jax.device_put(layer, device, may_alias=True) for layer in np.asarray(x)]


@jax.jit
def _turned(layers: Params) -> Params:
    """Return the stacked layers with their dense matrices in half precision turned, also those that a method rides on."""

    def turn(leaf: weights.Leaf) -> weights.Leaf:
        if isinstance(leaf, weights.Wrapper):
            return dataclasses.replace(leaf, base=turn(leaf.base))
        return leaf if _half(leaf) is None else Turned(jnp.swapaxes(leaf, -1, -2))

    return tree.unflatten(tree.flatten(layers) | {path: turn(leaf) for path, leaf in _matrices(layers).items()})


def _matrices(layers: Params) -> dict[str, weights.Leaf]:
    matrix = tree.predicate(tree.ALL_LINEAR)
    return {path: leaf for path, leaf in tree.flatten(layers).items() if matrix(f"layers/{path}")}


def _half(leaf: weights.Leaf) -> jax.Array | None:
    """Return the dense matrix in half precision that a leaf is, or rides on."""
    while isinstance(leaf, weights.Wrapper):
        leaf = leaf.base
    return leaf if not isinstance(leaf, weights.Weight) and jnp.dtype(leaf.dtype).itemsize == 2 else None


def apart_cache(cache: Cache) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the keys and values with an array `[b, k, s, c]` for each layer."""
    return tuple(tuple(x) for x in (cache.k, cache.v))
