"""Which key a query may see, and how a score is capped: what every implementation of attention agrees on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.types import BRANCH

MASKED = -2.0e38
"""The score of a key that may not be seen: finite, so that a row in which nothing is visible gives a mean and not NaN."""

EVERYONE = -1
"""The segment of virtual tokens, which a method puts before a row: every query sees them, they see only each other."""


def visible(
    q_positions: jax.Array, kv_positions: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, window: jax.Array | int | None
) -> jax.Array:
    """Return bool `[*b, t, s]`: of a segment that is seen, not later than the query, and less than `window` positions before it.

    A query sees its own segment, the one that this branches off (`types.BRANCH`), and everyone's.

    The window is one for all, or an array `[*b, t]` with one for each query.
    """
    distance = q_positions[..., :, None] - kv_positions[..., None, :]
    queries, keys = q_segment_ids[..., :, None], kv_segment_ids[..., None, :]
    seen = ((queries == keys) | (queries & (BRANCH - 1) == keys) | (keys == EVERYONE)) & (distance >= 0)
    if window is None:
        return seen
    return seen & (distance < (window[..., :, None] if jnp.ndim(window) else window))


def cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Return `softcap · tanh(scores / softcap)`, the identity without a cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def weigh(scores: jax.Array, seen: jax.Array, softcap: float | None) -> jax.Array:
    """Return the softmax of the capped float32 `scores` over the keys that are `seen`."""
    return jax.nn.softmax(jnp.where(seen, cap(scores, softcap), MASKED), axis=-1)
