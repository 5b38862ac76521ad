"""The key/value cache: what decoding remembers, one slot a token, all layers stacked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.models.config import Config
from ftjax.types import pytree, static


@pytree
class Cache:
    """Keys and values of the tokens seen so far.

    All rows are written at the same slot, so prompts of unequal length are padded on the left. A slot with segment 0 is empty or
    padding, and no real token attends to it.
    """

    k: jax.Array
    """`[l, b, s, k, c]`, already turned by the rotary embedding."""
    v: jax.Array
    """`[l, b, s, k, c]`."""
    positions: jax.Array
    """int32 `[b, s]`."""
    segment_ids: jax.Array
    """int32 `[b, s]`."""
    index: jax.Array
    """int32 scalar: the slot that the next token takes."""
    virtual: int = static(default=0)
    """How many of the tokens in it are virtual (see `ftjax.models.virtual`)."""


def init_cache(config: Config, batch_size: int, max_tokens: int, dtype: str = "float32") -> Cache:
    """Return an empty cache with room for `max_tokens` per row, padding included; `dtype` is that of the activations."""
    shape = (config.num_hidden_layers, batch_size, max_tokens, config.num_key_value_heads, config.head_dim)
    ids = (batch_size, max_tokens)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.zeros(ids, jnp.int32),
        segment_ids=jnp.zeros(ids, jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def advance(cache: Cache, positions: jax.Array, segment_ids: jax.Array) -> Cache:
    """Return the cache with the positions and segments of `t` more tokens; `write` stores their keys and values at `cache.index`."""
    return dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.index, axis=1),
        segment_ids=jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.index, axis=1),
        index=cache.index + positions.shape[1],
    )


def widen(cache: Cache, num_tokens: int) -> Cache:
    """Return the cache with room for so many more tokens."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, num_tokens if at == axis else 0) for at in range(x.ndim)])

    ids = {"positions": pad(cache.positions, 1), "segment_ids": pad(cache.segment_ids, 1)}
    return dataclasses.replace(cache, k=pad(cache.k, 2), v=pad(cache.v, 2), **ids)


def write(stored: jax.Array, layer: jax.Array, index: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `stored` `[l, b, s, k, c]` with `new` `[b, t, k, c]` at slots `index…` of one layer, and that layer `[b, s, k, c]`."""
    zero = jnp.zeros((), jnp.int32)
    stored = jax.lax.dynamic_update_slice(stored, new[None].astype(stored.dtype), (layer, zero, index, zero, zero))
    return stored, jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
