"""Layers that lie apart: a tree for each, and an array of the cache for each, where stacked ones are the rule.

A scan takes a layer's slice of what is stacked. XLA reads it in place on accelerators and copies it on a CPU: of no consequence for many
tokens, but a step of decoding does little more with a matrix, or with the keys and values before it, than to read them once. So what
writes many tokens on a CPU lays the layers apart first, once, and the decoder goes through them one by one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.models.cache import Cache
from ftjax.models.config import Config
from ftjax.types import Model, Params


def separable(model: Model, params: Params) -> bool:
    """Return whether the layers may lie apart: of a family of ours, whose parameters are all stacked."""
    if not isinstance(model.config, Config) or not isinstance(params.get("layers"), dict):
        return False
    return all(jnp.shape(x)[:1] == (model.config.num_hidden_layers,) for x in jax.tree.leaves(params["layers"]))


def apart(params: Params) -> Params:
    """Return the parameters with a tuple of trees in the place of the stacked layers."""
    count = len(jax.tree.leaves(params["layers"])[0])
    return {**params, "layers": tuple(jax.tree.map(lambda x, at=at: x[at], params["layers"]) for at in range(count))}


def apart_cache(cache: Cache) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the keys and values with an array `[1, b, k, s, c]` for each layer."""
    return tuple(tuple(x[at : at + 1] for at in range(len(x))) for x in (cache.k, cache.v))
