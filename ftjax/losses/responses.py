"""A response as one number: sums over its tokens, and its length."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Given = Array | np.ndarray
"""Rewards, masks and divergences are read on the host too."""


def token_sum(values: Float[Given, "*b t"], weights: Float[Given, "*b t"]) -> Float[Array, "*b"]:
    """Return Σ_t w_t · values_t; a value of weight 0 counts as 0 even if it is not finite."""
    return jnp.sum(jnp.where(weights > 0, values, 0) * weights, axis=-1)


def token_average(values: Float[Given, "*b t"], weights: Float[Given, "*b t"]) -> Float[Array, "*b"]:
    """Return Σ_t w_t · values_t / Σ_t w_t; 0 where nothing has a weight."""
    return token_sum(values, weights) / jnp.maximum(jnp.sum(weights, axis=-1), 1)


def likelihood(logps: Float[Given, "*b t"], mask: Float[Given, "*b t"], *, per_token: bool) -> Float[Array, "*b"]:
    """Return the log-likelihood of each response: what its tokens have on average, or all of it, which grows with the length."""
    return token_average(logps, mask) if per_token else token_sum(logps, mask)


def token_weights(lengths: Float[Given, "*b"], *, per_token: bool) -> Float[Array, "*b"]:
    """Return the derivative of `likelihood` by the log-probability of one token, from the tokens that each response has, at least 1."""
    return 1 / lengths if per_token else jnp.ones_like(lengths)


def shared_weights(mask: Float[Array, "*b 2 t"], tail: float) -> Float[Array, "*b 2 t"]:
    """Return 1 for as many tokens of each response as the shorter one of its pair has, and `tail` for the rest: LD-DPO.

    Liu et al., 2024, arXiv 2409.06411: the tokens that only the longer response has speak of its length more than of its quality.

    Args:
      mask: the tokens that count.
      tail: the weight of what is beyond, in [0, 1]; 1 is plain DPO.
    """
    shorter = jnp.min(jnp.sum(mask, axis=-1), axis=-1)[..., None, None]
    beyond = jnp.cumsum(mask, axis=-1) > jnp.broadcast_to(shorter, mask.shape)
    return jnp.where(beyond, tail * mask, mask)
