"""Which key a query may see, and how a score is capped: what every implementation of attention agrees on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -2.0e38
"""The score of a key that may not be seen: finite, so that a row in which nothing is visible gives a mean and not NaN."""


def visible(
    q_positions: jax.Array, kv_positions: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, window: jax.Array | int | None
) -> jax.Array:
    """Return bool `[*b, t, s]`: same segment, not later than the query, and less than `window` positions before it."""
    distance = q_positions[..., :, None] - kv_positions[..., None, :]
    seen = (q_segment_ids[..., :, None] == kv_segment_ids[..., None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Return `softcap · tanh(scores / softcap)`, the identity without a cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def weigh(scores: jax.Array, seen: jax.Array, softcap: float | None) -> jax.Array:
    """Return the softmax of the capped float32 `scores` over the keys that are `seen`."""
    return jax.nn.softmax(jnp.where(seen, cap(scores, softcap), MASKED), axis=-1)
