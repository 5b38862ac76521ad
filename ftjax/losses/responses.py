"""A response as one number: sums over its tokens, and its length."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return Σ_t w_t · values_t `[*b]` of `[*b, t]`; a value of weight 0 counts as 0 even if it is not finite."""
    return jnp.sum(jnp.where(weights > 0, values, 0) * weights, axis=-1)


def token_average(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return Σ_t w_t · values_t / Σ_t w_t `[*b]` of `[*b, t]`; 0 where nothing has a weight."""
    return token_sum(values, weights) / jnp.maximum(jnp.sum(weights, axis=-1), 1)


def shared_weights(mask: jax.Array, tail: float) -> jax.Array:
    """Return 1 for as many tokens of each response as the shorter one of its pair has, and `tail` for the rest: LD-DPO.

    Liu et al., 2024, arXiv 2409.06411: the tokens that only the longer response has speak of its length more than of its quality.

    Args:
      mask: `[*b, 2, t]`: the tokens that count.
      tail: the weight of what is beyond, in [0, 1]; 1 is plain DPO.
    """
    shorter = jnp.min(jnp.sum(mask, axis=-1), axis=-1)[..., None, None]
    beyond = jnp.cumsum(mask, axis=-1) > jnp.broadcast_to(shorter, mask.shape)
    return jnp.where(beyond, tail * mask, mask)
