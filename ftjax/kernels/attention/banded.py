"""Blocks of queries that take no more keys than their windows reach back: how many is seen when the program runs.

Glossary: a *width* is how many keys a block takes, its own included, in whole blocks. Groups begin anywhere in a row, so a block may need
keys up to `reach` before it; but one in the middle of a group needs only those from the group's beginning, on average half as many. Each
width is a branch, and one of them runs: for heads that are visited one after another, as on a CPU; side by side all branches would run.

Memory: `g · block · width` scores in float32, and one program for all blocks. It must equal what `blocked` does with all keys within reach.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.kernels.attention import block
from ftjax.kernels.attention.block import BLOCK, Form, Row

BLOCKS = 4
"""In a group, where that gives them `BLOCK` queries or more."""
NOBODY = -2
"""The segment of what fills up the first and the last block."""


class _Band(NamedTuple):
    """A row in blocks of queries, with keys from before its first block on."""

    widths: tuple[int, ...]
    """The first is the size of a block."""
    chosen: jax.Array
    """int32 `[n]`: which of the widths each block takes."""
    queries: tuple[jax.Array, ...]
    """Positions, segments and windows of the queries, `[n, size]` each."""
    keys: tuple[jax.Array, ...]
    """Positions and segments of the keys."""


def head(form: Form, row: Row, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the attention `[g, t, c]` of one head of one row, and the log of its normalisers `[g, t]`: q `[g, t, c]`, k, v `[t, c]`."""
    band, t = _band(form, row), q.shape[1]
    k, v = _keys(band, k), _keys(band, v)

    def one(item):
        index, chosen, ids, q = item

        def run(width: int):
            take = functools.partial(_take, start=_start(band, index, width), width=width)
            return block.attend(form, _row(ids, map(take, band.keys)), q, take(k), take(v))

        return jax.lax.switch(chosen, [functools.partial(run, width) for width in band.widths])

    out, normalizer = jax.lax.map(one, (jnp.arange(len(band.chosen)), band.chosen, band.queries, _queries(band, q)))
    return _joined(out, t), _joined(normalizer, t)


def head_gradient(form: Form, row: Row, q, k, v, out, normalizer, cotangent) -> tuple[jax.Array, ...]:
    """Return the gradients of one head's q, k and v."""
    band, t = _band(form, row), q.shape[1]
    keys, values = _keys(band, k), _keys(band, v)

    def one(sums, item):
        index, chosen, ids, (q, *parts) = item

        def run(width: int):
            start = _start(band, index, width)
            take = functools.partial(_take, start=start, width=width)
            d_q, *d_kv = block.gradient(form, _row(ids, map(take, band.keys)), q, take(keys), take(values), *parts)
            added = (take(total) + d for total, d in zip(sums, d_kv, strict=True))
            return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=0) for x, y in zip(sums, added, strict=True)), d_q

        return jax.lax.switch(chosen, [functools.partial(run, width) for width in band.widths])

    parts = tuple(_queries(band, x) for x in (q, out, normalizer, cotangent))
    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(one, zeros, (jnp.arange(len(band.chosen)), band.chosen, band.queries, parts))
    before = band.widths[-1] - band.widths[0]
    return _joined(d_q, t), d_k[before : before + t].astype(k.dtype), d_v[before : before + t].astype(v.dtype)


def _band(form: Form, row: Row) -> _Band:
    t = row.q_positions.shape[0]
    size = max(BLOCK, -(-form.reach // (BLOCKS * BLOCK)) * BLOCK)
    widths = tuple(size * (1 + n) for n in range(1 + -(-(form.reach - 1) // size)))
    fill = -(-t // size) * size - t
    # No query sees a key before its document; those that fill up the last block see nothing.
    back = jnp.pad(jnp.minimum(row.window, row.q_positions + 1), (0, fill), constant_values=1)
    first = (jnp.arange(t + fill) - back + 1).reshape(-1, size).min(axis=1)
    needed = (1 + jnp.arange(len(first))) * size - first
    queries = (jnp.pad(row.q_positions, (0, fill)), jnp.pad(row.q_segment_ids, (0, fill), constant_values=NOBODY), back)
    ends = (widths[-1] - size, fill)
    keys = (jnp.pad(row.kv_positions, ends), jnp.pad(row.kv_segment_ids, ends, constant_values=NOBODY))
    chosen = jnp.clip(-(-needed // size) - 1, 0, len(widths) - 1).astype(jnp.int32)
    return _Band(widths, chosen, tuple(x.reshape(-1, size) for x in queries), keys)


def _row(queries: tuple[jax.Array, ...], keys) -> Row:
    (q_positions, q_segment_ids, window), (kv_positions, kv_segment_ids) = queries, keys
    return Row(q_positions, kv_positions, q_segment_ids, kv_segment_ids, window)


def _queries(band: _Band, x: jax.Array) -> jax.Array:
    """Return `[g, t, …]` as blocks `[n, g, size, …]`."""
    n, size = band.queries[0].shape
    x = jnp.pad(x, [(0, n * size - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(len(x), n, size, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array, t: int) -> jax.Array:
    """Return `[g, t, …]` from blocks."""
    n, g, size = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(g, n * size, *blocks.shape[3:])[:, :t]


def _keys(band: _Band, x: jax.Array) -> jax.Array:
    """Return `[t, c]` with what is before the first block and behind the last."""
    before = band.widths[-1] - band.widths[0]
    return jnp.pad(x, ((before, len(band.keys[0]) - before - len(x)), (0, 0)))


def _start(band: _Band, index: jax.Array, width: int) -> jax.Array:
    """Return where the keys of a block begin."""
    return index * band.widths[0] + band.widths[-1] - width


def _take(x: jax.Array, *, start: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, width)
