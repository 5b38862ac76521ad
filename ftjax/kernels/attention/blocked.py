"""Attention in blocks of queries that stop at the diagonal, so that no array of size t·s is ever held for all heads at once.

Glossary: a *block* is up to `BLOCK` consecutive queries of one row, more in a long row; a *head* is one key/value head with the `g` query
heads that share it, their queries stacked into one matrix; *each* says how heads are visited: one after another (`jax.lax.map`) or all at
once (`jax.vmap`).

Memory: one after another, `g · block · s` scores in float32; all at once, `b · h · block · s`. The backward pass keeps only the inputs and
computes the scores of a block again. It must equal `ftjax.kernels.attention.reference`.

One after another is the fast form on a CPU, because XLA multiplies plain matrices with its tuned routine and batches of them without.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.kernels.attention import mask

BLOCK = 128
"""The least number of queries in a block."""
MAX_BLOCKS = 16
"""Blocks are unrolled, so a long row has larger ones; sixteen waste a sixteenth beyond the diagonal."""


class _Form(NamedTuple):
    """What is known before tracing."""

    each: str
    softcap: float | None
    scale: float
    window: int | None


class _Row(NamedTuple):
    """Positions and segments of one row, and the window where it is an array."""

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segment_ids: jax.Array
    kv_segment_ids: jax.Array
    window: jax.Array | None


def attention(q, k, v, *, q_positions, kv_positions, q_segment_ids, kv_segment_ids, window, softcap, scale, each="platform") -> jax.Array:
    """Return what `reference.attention` returns; the arguments are those of `ftjax.kernels.attention.attention`.

    `each` is how heads are visited: `"map"`, `"vmap"`, or `"platform"` for the first on a CPU and the second elsewhere, chosen when the
    program is lowered, so that a program compiled for a TPU on a CPU host is the TPU's.
    """
    static = window if isinstance(window, int) else None
    traced = None if static is not None or window is None else jnp.broadcast_to(jnp.asarray(window), q.shape[:1])
    b, t, h, c = q.shape
    heads = jnp.moveaxis(q.reshape(b, t, k.shape[2], -1, c), 1, 3)  # [b, k, g, t, c]
    rows = _Row(q_positions, kv_positions, q_segment_ids, kv_segment_ids, traced)
    out = _attend(_Form(each, softcap, scale, static), (heads, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)), rows)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, arrays: tuple[jax.Array, ...], rows: _Row) -> jax.Array:
    return _visit(form, lambda row, qkv: _head(form, row, *qkv), arrays, rows)


def _forward(form, arrays, rows):
    return _attend(form, arrays, rows), (arrays, rows)


def _backward(form, residuals, cotangent):
    """Differentiate head by head, so that the choice of platform and the loop over heads are never differentiated themselves."""

    def one(row, qkv_and_cotangent):
        *qkv, cotangent = qkv_and_cotangent
        return jax.vjp(lambda *qkv: _head(form, row, *qkv), *qkv)[1](cotangent)

    arrays, rows = residuals
    return _visit(form, one, (*arrays, cotangent), rows), None


_attend.defvjp(_forward, _backward)


def _visit(form: _Form, one: Any, arrays: tuple[jax.Array, ...], rows: _Row) -> Any:
    """Return `one(row, arrays of one head)` for every head of every row."""
    by_map = functools.partial(_for_each_head, one, jax.lax.map)
    by_vmap = functools.partial(_for_each_head, one, lambda f, xs: jax.vmap(f)(xs))
    if form.each == "platform":
        return jax.lax.platform_dependent(arrays, rows, cpu=by_map, default=by_vmap)
    return {"map": by_map, "vmap": by_vmap}[form.each](arrays, rows)


def _for_each_head(one, each, arrays, rows):
    return each(lambda row: each(lambda head: one(row[1], head), row[0]), (arrays, rows))


def _head(form: _Form, row: _Row, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return the attention of one head of one row: q `[g, t, c]` over k, v `[s, c]`."""
    t, s = q.shape[1], k.shape[0]
    size = max(BLOCK, -(-t // (MAX_BLOCKS * BLOCK)) * BLOCK)
    outs = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        first, last = (0, s) if t != s else (0 if form.window is None else max(0, start - form.window + 1), stop)
        block = jax.checkpoint(functools.partial(_block, form), prevent_cse=False)
        part = row._replace(
            q_positions=row.q_positions[start:stop],
            q_segment_ids=row.q_segment_ids[start:stop],
            kv_positions=row.kv_positions[first:last],
            kv_segment_ids=row.kv_segment_ids[first:last],
        )
        outs.append(block(part, q[:, start:stop], k[first:last], v[first:last]))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _block(form: _Form, row: _Row, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    g, t, c = q.shape
    scores = jnp.dot(q.reshape(g * t, c), k.T, preferred_element_type=jnp.float32) * form.scale
    window = form.window if row.window is None else row.window
    seen = mask.visible(row.q_positions, row.kv_positions, row.q_segment_ids, row.kv_segment_ids, window)
    weights = mask.weigh(scores.reshape(g, t, -1), seen[None], form.softcap).astype(v.dtype)
    out = jnp.dot(weights.reshape(g * t, -1), v, preferred_element_type=jnp.float32)
    return out.reshape(g, t, c).astype(q.dtype)
