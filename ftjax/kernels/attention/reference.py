"""Attention as its equation: the function that every other implementation must equal, on any platform, in O(t·s) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.kernels.attention import mask


def attention(
    q, k, v, *, q_positions, kv_positions, q_segment_ids, kv_segment_ids, window, softcap, scale, reach=None, keys_first=False
) -> jax.Array:
    """Return `softmax(cap(q kᵀ · scale)) v` with the softmax in float32; see `ftjax.kernels.attention.attention`.

    With `keys_first` the scores are made as `(k qᵀ)ᵀ`: for few queries, where XLA:CPU reads the left of a product as it lies and copies the
    right.
    """
    del reach  # how far back keys are needed at all
    b, t, h, c = q.shape
    # The queries that share a key head as one axis: with two, XLA:CPU copies all keys, or cannot multiply in bfloat16.
    heads = jnp.moveaxis(q.reshape(b, t, k.shape[2], -1, c), 1, 3)
    queries = heads.reshape(b, k.shape[2], -1, c)
    if keys_first:
        scores = jnp.einsum("bskc,bkqc->bksq", k, queries, preferred_element_type=jnp.float32)
        # Without the barrier the compiler swaps the two again.
        scores = jnp.moveaxis(jax.lax.optimization_barrier(scores), 3, 2) * scale
    else:
        scores = jnp.einsum("bkqc,bskc->bkqs", queries, k, preferred_element_type=jnp.float32) * scale
    ids = q_positions[:, None], kv_positions[:, None], q_segment_ids[:, None], kv_segment_ids[:, None]
    seen = mask.visible(*ids, window)[:, :, None]
    weights = mask.weigh(scores.reshape(*heads.shape[:4], -1), seen, softcap).astype(v.dtype)
    out = jnp.einsum("bkqs,bskc->bkqc", weights.reshape(scores.shape), v, preferred_element_type=jnp.float32)
    return jnp.moveaxis(out.reshape(heads.shape), 3, 1).reshape(b, t, h, c).astype(q.dtype)
