"""Virtual tokens: what a method puts before every row, for all documents packed into it to see.

A *prompt* is vectors that go through all layers as embedded tokens do, `prompt/embedding` [n, d]. A *prefix* is keys and values that each
layer finds there, `layers/slots/prefix/{key,value}` [l, n, k·c], the keys as after the rotary embedding. Both belong to everyone
(`mask.EVERYONE`), take the first positions and so move those of the real tokens by as many: packing and padding change nothing. The
hidden states that a model returns are those of the real tokens alone.

With a cache they are written once, by the first call, into slots that it adds for them; `Cache.virtual` says that they are there.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.kernels.attention import mask
from ftjax.models import cache as cache_lib
from ftjax.models.cache import Cache
from ftjax.types import Model, Params

PROMPT, PREFIX = "prompt", "prefix"
"""The slots: a branch at the root, and one of `layers/slots`."""


class Row(NamedTuple):
    """What goes through the layers, a prompt included."""

    x: jax.Array
    """`[b, t, d]`."""
    positions: jax.Array
    """int `[b, t]`."""
    segment_ids: jax.Array
    kv_positions: jax.Array
    """int `[b, s]`: those of all keys: of the cache, or of a prefix and the row."""
    kv_segment_ids: jax.Array
    start: jax.Array | None
    """The slot of the cache that the row takes."""


def count(params: Params) -> tuple[int, int]:
    """Return how many virtual tokens the parameters hold, `(of a prefix, of a prompt)`."""
    layers = params["layers"][0] if isinstance(params["layers"], tuple) else params["layers"]
    prefix, prompt = layers.get("slots", {}).get(PREFIX), params.get(PROMPT)
    return 0 if prefix is None else prefix["key"].shape[-2], 0 if prompt is None else prompt["embedding"].shape[0]


def prefix_of(model: Model, params: Params, tokens: jax.Array) -> Params:
    """Return the key and value `[l, n, k·c]` that a text `[n]` leaves in each layer: a prefix that says the same as the text."""
    _, cache = model.apply(params, tokens[None], cache=cache_lib.init_cache(model.config, 1, len(tokens)))
    return {field: jnp.moveaxis(x[:, 0], 1, 2).reshape(len(x), len(tokens), -1) for field, x in (("key", cache.k), ("value", cache.v))}


def put_first(params: Params, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None) -> tuple[Row, Cache | None]:
    """Return embedded tokens `[b, t, d]` behind the virtual ones, and the cache with the positions and segments of all of them.

    Raises:
      ValueError: the cache was begun with another number of virtual tokens.
    """
    of_prefix, of_prompt = count(params)
    total, begun = of_prefix + of_prompt, cache is not None and cache.virtual > 0
    if begun and cache.virtual != total:
        raise ValueError(f"models: the cache was begun with {cache.virtual} virtual tokens and the parameters hold {total}.")
    positions = positions + total
    if of_prompt and not begun:
        prompt = jnp.broadcast_to(params[PROMPT]["embedding"].astype(x.dtype)[None], (len(x), of_prompt, x.shape[2]))
        x = jnp.concatenate([prompt, x], axis=1)
        positions, segment_ids = _behind(_ids(len(x), of_prefix, of_prompt), (positions, segment_ids))
    if cache is None:
        keys = _behind(_ids(len(x), 0, of_prefix), (positions, segment_ids))
        return Row(x, positions, segment_ids, *keys, None), None
    if total and not begun:
        cache = _begin(cache, params, of_prefix, total)
    start, cache = cache.index, cache_lib.advance(cache, positions, segment_ids)
    return Row(x, positions, segment_ids, cache.positions, cache.segment_ids, start), cache


def behind_prefix(prefix: Params, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys and values `[b, t, k, c]` of a layer behind those of its prefix `[n, k·c]`."""
    first = (_heads(prefix["key"], k), _heads(prefix["value"], v))
    return _behind(first, (k, v))


def _begin(cache: Cache, params: Params, of_prefix: int, total: int) -> Cache:
    """Return the cache with room for virtual tokens, those of a prefix in it."""
    cache = dataclasses.replace(cache_lib.widen(cache, total), virtual=total)
    if not of_prefix:
        return cache
    prefix, zero = params["layers"]["slots"][PREFIX], jnp.zeros((), jnp.int32)
    at = (zero, zero, zero, cache.index, zero)
    k, v = (
        jax.lax.dynamic_update_slice(stored, _for_rows(prefix[name], stored), at) for name, stored in (("key", cache.k), ("value", cache.v))
    )
    return dataclasses.replace(cache_lib.advance(cache, *_ids(cache.k.shape[1], 0, of_prefix)), k=k, v=v)


def _for_rows(prefix: jax.Array, stored: jax.Array) -> jax.Array:
    """Return `[l, n, k·c]` as `[l, b, k, n, c]`, for every row of what is stored `[l, b, k, s, c]`."""
    _, b, k, _, c = stored.shape
    heads = jnp.moveaxis(prefix.astype(stored.dtype).reshape(len(prefix), -1, k, c), 1, 2)
    return jnp.broadcast_to(heads[:, None], (len(heads), b, *heads.shape[1:]))


def _heads(prefix: jax.Array, like: jax.Array) -> jax.Array:
    """Return `[n, k·c]` as `[b, n, k, c]` in the dtype, heads and rows of `like` `[b, s, k, c]`."""
    b, _, k, c = like.shape
    return jnp.broadcast_to(prefix.astype(like.dtype).reshape(1, -1, k, c), (b, len(prefix), k, c))


def _ids(b: int, first: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Return the positions and segments `[b, n]` of virtual tokens."""
    positions = jnp.broadcast_to(jnp.arange(first, first + n, dtype=jnp.int32)[None], (b, n))
    return positions, jnp.full((b, n), mask.EVERYONE, jnp.int32)


def _behind(first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    one, two = (jnp.concatenate(pair, axis=1) if pair[0].shape[1] else pair[1] for pair in zip(first, then, strict=True))
    return one, two
