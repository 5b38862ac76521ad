"""One block: some queries of a head, the keys that they may see, and what attention makes of them; see `blocked`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.kernels.attention import mask

BLOCK = 128
"""The least number of queries in a block."""


class Form(NamedTuple):
    """What is known before tracing."""

    each: str
    softcap: float | None
    scale: float
    window: int | None
    reach: int | None
    """No query sees a key so many places before it."""


class Row(NamedTuple):
    """Positions and segments of one row, and the window where it is an array: one, or one for each query of each head `[k, t]`."""

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segment_ids: jax.Array
    kv_segment_ids: jax.Array
    window: jax.Array | None

    def cut(self, queries: slice, keys: slice) -> Row:
        """Return those of a block."""
        window = self.window if self.window is None or self.window.ndim == 0 else self.window[queries]
        return Row(self.q_positions[queries], self.kv_positions[keys], self.q_segment_ids[queries], self.kv_segment_ids[keys], window)


def attend(form: Form, row: Row, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the attention `[g, t, c]` of some queries, and the log of their normalisers `[g, t]`: q `[g, t, c]`, k, v `[s, c]`."""
    scores, _ = _scores(form, row, q, k)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # Rounded, then summed: the product is divided by what it adds up. Without the barrier each reader takes the exponential again.
    weights = jax.lax.optimization_barrier(jnp.exp(scores - top).astype(v.dtype))
    total = jnp.sum(weights.astype(jnp.float32), axis=-1, keepdims=True)
    out = _product(weights, v) / total
    return out.astype(q.dtype), (top + jnp.log(total))[..., 0]


def gradient(form: Form, row: Row, q, k, v, out, normalizer, cotangent) -> tuple[jax.Array, ...]:
    """Return the gradients of q, and in float32 those of k and v."""
    shared = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    scores, slope = _scores(form, row, q, k)
    weights = jnp.exp(scores - normalizer[..., None])
    d_scores = weights * (_product_transposed(cotangent, v) - shared) * form.scale
    d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
    return _product(d_scores, k).astype(q.dtype), _outer(form, d_scores, q), _outer(form, weights.astype(v.dtype), cotangent)


def _scores(form: Form, row: Row, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return the scores `[g, t, s]` of a block in float32, and their derivative by the uncapped ones if there is a cap."""
    raw = _product_transposed(q, k) * form.scale
    capped = mask.cap(raw, form.softcap)
    window = form.window if row.window is None else row.window
    slope = None if form.softcap is None else 1 - jnp.square(capped / form.softcap)
    return jnp.where(mask.visible(*row[:4], window)[None], capped, mask.MASKED), slope


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `x @ y`, `[g, t, i] @ [i, o]`, as one plain matrix product accumulated in float32."""
    g, t, i = x.shape
    return jnp.dot(x.reshape(g * t, i), y, preferred_element_type=jnp.float32).reshape(g, t, -1)


def _product_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `x @ yᵀ`, `[g, t, i], [o, i] -> [g, t, o]`, likewise; a CPU is twice as fast where the transpose is the product's own."""
    g, t, i = x.shape
    out = jax.lax.dot_general(x.reshape(g * t, i), y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out.reshape(g, t, -1)


def _outer(form: Form, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `Σ_g x_gᵀ y_g`, `[g, t, s], [g, t, c] -> [s, c]`, in float32."""
    left, right = x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1])
    # A CPU multiplies twice as fast if the transpose is made first and not folded into the product.
    return jnp.dot(jax.lax.optimization_barrier(left) if form.each == "map" else left, right, preferred_element_type=jnp.float32)
