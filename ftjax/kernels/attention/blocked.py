"""Attention in blocks of queries that stop at the diagonal, so that no array of size t·s is ever held for all heads at once.

Glossary: a *block* is up to `BLOCK` consecutive queries of one row, more in a long row; a *head* is one key/value head with the `g` query
heads that share it, their queries stacked into one matrix; *each* says how heads are visited: one after another (`jax.lax.map`) or all at
once (`jax.vmap`).

Memory: one after another, `g · block · s` scores in float32; all at once, `b · h · block · s`. The backward pass keeps the inputs, the
outputs and the log of each query's normaliser, and computes the scores of a block again: with p = exp(scores - log normaliser) the
gradient of the scores is p · (dout vᵀ - dout · out) (Dao et al. 2022, arXiv:2205.14135, appendix B). It must equal
`ftjax.kernels.attention.reference`.

One after another is the fast form on a CPU, because XLA multiplies plain matrices with its tuned routine and batches of them without. Where
every query has a window of its own, `banded` then does the work.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax.kernels.attention import banded, block
from ftjax.kernels.attention.block import BLOCK, Form, Row
from ftjax.weights import PRODUCT

MAX_BLOCKS = 16
"""Blocks are unrolled, so a long row has larger ones; sixteen waste a sixteenth beyond the diagonal."""


def attention(
    q, k, v, *, q_positions, kv_positions, q_segment_ids, kv_segment_ids, window, softcap, scale, reach=None, each="platform"
) -> jax.Array:
    """Return what `reference.attention` returns; the arguments are those of `ftjax.kernels.attention.attention`.

    `each` is how heads are visited: `"map"`, `"vmap"`, or `"platform"` for the first on a CPU and the second elsewhere, chosen when the
    program is lowered, so that a program compiled for a TPU on a CPU host is the TPU's.
    `reach` bounds the window where that is an array: no query sees a key so many places before it.
    """
    static = window if isinstance(window, int) else None
    traced = None if static is not None or window is None else jnp.asarray(window)
    traced = jnp.broadcast_to(traced, q.shape[:1]) if traced is not None and traced.ndim == 0 else traced
    b, t, h, c = q.shape
    heads = jnp.moveaxis(q.reshape(b, t, k.shape[2], -1, c), 1, 3)  # [b, k, g, t, c]
    rows = Row(q_positions, kv_positions, q_segment_ids, kv_segment_ids, traced)
    out = _attend(Form(each, softcap, scale, static, reach), (heads, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)), rows)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: Form, arrays: tuple[jax.Array, ...], rows: Row) -> jax.Array:
    return _visit(form, _head, arrays, rows)[0]


def _forward(form, arrays, rows):
    out, normalizer = (checkpoint_name(x, PRODUCT) for x in _visit(form, _head, arrays, rows))
    return out, (arrays, rows, out, normalizer)


def _backward(form, residuals, cotangent):
    arrays, rows, out, normalizer = residuals
    return _visit(form, _head_gradient, (*arrays, out, normalizer, cotangent), rows), None


_attend.defvjp(_forward, _backward)


def _visit(form: Form, one: Any, arrays: tuple[jax.Array, ...], rows: Row) -> Any:
    """Return `one(form, row, *arrays of one head)` for every head of every row."""
    by_query = rows.window is not None and rows.window.ndim == 3 and rows.q_positions.shape == rows.kv_positions.shape
    in_turn = {_head: banded.head, _head_gradient: banded.head_gradient}[one] if by_query else one
    forms = {
        "map": functools.partial(_for_each_head, functools.partial(in_turn, form._replace(each="map")), jax.lax.map),
        "vmap": functools.partial(_for_each_head, functools.partial(one, form._replace(each="vmap")), lambda f, xs: jax.vmap(f)(xs)),
    }
    if form.each == "platform":
        return jax.lax.platform_dependent(arrays, rows, cpu=forms["map"], default=forms["vmap"])
    return forms[form.each](arrays, rows)


def _for_each_head(one, each, arrays, rows):
    def visit(item):
        heads, row = item
        if row.window is None or row.window.ndim == 0:
            return each(lambda head: one(row, *head), heads)
        return each(lambda item: one(row._replace(window=item[0]), *item[1]), (row.window, heads))

    return each(visit, (arrays, rows))


def _blocks(form: Form, t: int, s: int) -> list[tuple[slice, slice]]:
    """Return the queries of each block and the keys that they may see; query i stands at key s - t + i, or before where slots are empty."""
    size = max(BLOCK, -(-t // (MAX_BLOCKS * BLOCK)) * BLOCK)
    blocks = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        first = 0 if form.reach is None or t != s else max(0, start - form.reach + 1)
        blocks.append((slice(start, stop), slice(first, s - t + stop)))
    return blocks


def _head(form: Form, row: Row, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the attention `[g, t, c]` of one head of one row, and the log of its normalisers `[g, t]`: q `[g, t, c]`, k, v `[s, c]`."""
    outs, normalizers = [], []
    for queries, keys in _blocks(form, q.shape[1], k.shape[0]):
        out, normalizer = block.attend(form, row.cut(queries, keys), q[:, queries], k[keys], v[keys])
        outs.append(out)
        normalizers.append(normalizer)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(normalizers, axis=1)


def _head_gradient(form: Form, row: Row, q, k, v, out, normalizer, cotangent) -> tuple[jax.Array, ...]:
    """Return the gradients of one head's q, k and v."""
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys in _blocks(form, q.shape[1], k.shape[0]):
        parts = (x[:, queries] for x in (out, normalizer, cotangent))
        d_queries, d_keys, d_values = block.gradient(form, row.cut(queries, keys), q[:, queries], k[keys], v[keys], *parts)
        d_q.append(d_queries)
        d_k = d_k.at[keys].add(d_keys)
        d_v = d_v.at[keys].add(d_values)
    return jnp.concatenate(d_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype)
