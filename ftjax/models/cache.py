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

    All rows are written at the same slot, so prompts of unequal length are padded on the left; or a row that joins later is laid so that it
    ends there (see `ftjax.rollout.slots`). A slot with segment 0 is empty or padding, and no real token attends to it.
    """

    k: jax.Array
    """`[l, b, k, s, c]`, already turned by the rotary embedding: the slots of a head lie together, as attention reads them. Where layers
    lie apart (see `ftjax.models.apart`) a tuple of them, `[b, k, s, c]` for each layer."""
    v: jax.Array
    """`[l, b, k, s, c]`."""
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
    shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
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
    return dataclasses.replace(cache, k=pad(cache.k, 3), v=pad(cache.v, 3), **ids)


def write(stored: jax.Array, layer: jax.Array, index: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `stored` with `new` `[b, t, k, c]` at slots `index…` of one layer, and that layer `[b, s, k, c]`.

    `stored` is that of all layers, `[l, b, k, s, c]`, or of this one alone, `[b, k, s, c]`.
    """
    new = jnp.moveaxis(new, 1, 2).astype(stored.dtype)
    if stored.ndim == new.ndim:
        # Without the barrier XLA:CPU updates it in one place and again for its reader, and copies what both need.
        stored = own = jax.lax.optimization_barrier(jax.lax.dynamic_update_slice_in_dim(stored, new, index, axis=2))
    else:
        zero = jnp.zeros((), jnp.int32)
        stored = jax.lax.dynamic_update_slice(stored, new[None], (layer, zero, zero, index, zero))
        own = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
    # Moved back in name alone: the compiler hands the product the heads as they lie.
    return stored, jnp.moveaxis(own, 1, 2)
