"""Attention as its equation: the function that every other implementation must equal, on any platform, in O(t·s) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.kernels.attention import mask


def attention(q, k, v, *, q_positions, kv_positions, q_segment_ids, kv_segment_ids, window, softcap, scale, reach=None) -> jax.Array:
    """Return `softmax(cap(q kᵀ · scale)) v` with the softmax in float32; see `ftjax.kernels.attention.attention`."""
    del reach  # how far back keys are needed at all
    b, t, h, c = q.shape
    queries = q.reshape(b, t, k.shape[2], -1, c)
    scores = jnp.einsum("btkgc,bskc->bkgts", queries, k, preferred_element_type=jnp.float32) * scale
    ids = q_positions[:, None], kv_positions[:, None], q_segment_ids[:, None], kv_segment_ids[:, None]
    seen = mask.visible(*ids, window)[:, :, None]
    weights = mask.weigh(scores, seen, softcap).astype(v.dtype)
    out = jnp.einsum("bkgts,bskc->btkgc", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, t, h, c).astype(q.dtype)
