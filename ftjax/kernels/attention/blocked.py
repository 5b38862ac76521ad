"""Attention in blocks of queries that stop at the diagonal, so that no array of size t·s is ever held for all heads at once.

Glossary: a *block* is up to `BLOCK` consecutive queries of one row, more in a long row; a *head* is one key/value head with the `g` query
heads that share it, their queries stacked into one matrix; *each* says how heads are visited: one after another (`jax.lax.map`) or all at
once (`jax.vmap`).

Memory: one after another, `g · block · s` scores in float32; all at once, `b · h · block · s`. The backward pass keeps the inputs, the
outputs and the log of each query's normaliser, and computes the scores of a block again: with p = exp(scores - log normaliser) the
gradient of the scores is p · (dout vᵀ - dout · out) (Dao et al. 2022, arXiv:2205.14135, appendix B). It must equal
`ftjax.kernels.attention.reference`.

One after another is the fast form on a CPU, because XLA multiplies plain matrices with its tuned routine and batches of them without.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax.kernels.attention import mask
from ftjax.weights import PRODUCT

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
    reach: int | None
    """No query sees a key so many places before it."""


class _Row(NamedTuple):
    """Positions and segments of one row, and the window where it is an array: one, or one for each query of each head `[k, t]`."""

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segment_ids: jax.Array
    kv_segment_ids: jax.Array
    window: jax.Array | None


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
    rows = _Row(q_positions, kv_positions, q_segment_ids, kv_segment_ids, traced)
    out = _attend(_Form(each, softcap, scale, static, reach), (heads, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)), rows)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, arrays: tuple[jax.Array, ...], rows: _Row) -> jax.Array:
    return _visit(form, _head, arrays, rows)[0]


def _forward(form, arrays, rows):
    out, normalizer = (checkpoint_name(x, PRODUCT) for x in _visit(form, _head, arrays, rows))
    return out, (arrays, rows, out, normalizer)


def _backward(form, residuals, cotangent):
    arrays, rows, out, normalizer = residuals
    return _visit(form, _head_gradient, (*arrays, out, normalizer, cotangent), rows), None


_attend.defvjp(_forward, _backward)


def _visit(form: _Form, one: Any, arrays: tuple[jax.Array, ...], rows: _Row) -> Any:
    """Return `one(form, row, *arrays of one head)` for every head of every row."""
    forms = {
        "map": functools.partial(_for_each_head, functools.partial(one, form._replace(each="map")), jax.lax.map),
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


def _blocks(form: _Form, t: int, s: int) -> list[tuple[slice, slice]]:
    """Return the queries of each block and the keys that they may see; query i stands at key s - t + i, or before where slots are empty."""
    size = max(BLOCK, -(-t // (MAX_BLOCKS * BLOCK)) * BLOCK)
    blocks = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        first = 0 if form.reach is None or t != s else max(0, start - form.reach + 1)
        blocks.append((slice(start, stop), slice(first, s - t + stop)))
    return blocks


def _head(form: _Form, row: _Row, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the attention `[g, t, c]` of one head of one row, and the log of its normalisers `[g, t]`: q `[g, t, c]`, k, v `[s, c]`."""
    outs, normalizers = [], []
    for queries, keys in _blocks(form, q.shape[1], k.shape[0]):
        scores, _ = _scores(form, row, q, k, queries, keys)
        top = jnp.max(scores, axis=-1, keepdims=True)
        # Rounded, then summed: the product is divided by what it adds up. Without the barrier each reader takes the exponential again.
        weights = jax.lax.optimization_barrier(jnp.exp(scores - top).astype(v.dtype))
        total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
        out = _product(weights, v[keys]) / total
        outs.append(out.astype(q.dtype))
        normalizers.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(outs, axis=1), jnp.concatenate(normalizers, axis=1)


def _head_gradient(form: _Form, row: _Row, q, k, v, out, normalizer, cotangent) -> tuple[jax.Array, ...]:
    """Return the gradients of one head's q, k and v."""
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys in _blocks(form, q.shape[1], k.shape[0]):
        d_out = cotangent[:, queries]
        shared = jnp.sum(d_out.astype(jnp.float32) * out[:, queries].astype(jnp.float32), axis=-1, keepdims=True)
        scores, slope = _scores(form, row, q, k, queries, keys)
        weights = jnp.exp(scores - normalizer[:, queries, None])
        d_scores = weights * (_product_transposed(d_out, v[keys]) - shared) * form.scale
        d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
        d_q.append(_product(d_scores, k[keys]).astype(q.dtype))
        d_k = d_k.at[keys].add(_outer(form, d_scores, q[:, queries]))
        d_v = d_v.at[keys].add(_outer(form, weights.astype(v.dtype), d_out))
    return jnp.concatenate(d_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _scores(form: _Form, row: _Row, q, k, queries: slice, keys: slice) -> tuple[jax.Array, jax.Array | None]:
    """Return the scores `[g, t, s]` of a block in float32, and their derivative by the uncapped ones if there is a cap."""
    raw = _product_transposed(q[:, queries], k[keys]) * form.scale
    capped = mask.cap(raw, form.softcap)
    window = form.window if row.window is None else row.window
    window = window if window is None or not jnp.ndim(window) else window[queries]
    ids = row.q_positions[queries], row.kv_positions[keys], row.q_segment_ids[queries], row.kv_segment_ids[keys]
    slope = None if form.softcap is None else 1 - jnp.square(capped / form.softcap)
    return jnp.where(mask.visible(*ids, window)[None], capped, mask.MASKED), slope


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `x @ y`, `[g, t, i] @ [i, o]`, as one plain matrix product accumulated in float32."""
    g, t, i = x.shape
    return jnp.dot(x.reshape(g * t, i), y, preferred_element_type=jnp.float32).reshape(g, t, -1)


def _product_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `x @ yᵀ`, `[g, t, i], [o, i] -> [g, t, o]`, likewise; a CPU is twice as fast where the transpose is the product's own."""
    g, t, i = x.shape
    out = jax.lax.dot_general(x.reshape(g * t, i), y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out.reshape(g, t, -1)


def _outer(form: _Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `Σ_g x_gᵀ y_g`, `[g, t, s], [g, t, c] -> [s, c]`, in float32."""
    left, right = x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1])
    # A CPU multiplies twice as fast if the transpose is made first and not folded into the product.
    return jnp.dot(jax.lax.optimization_barrier(left) if form.each == "map" else left, right, preferred_element_type=jnp.float32)
