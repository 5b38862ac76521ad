"""Which tokens are worth learning from: those where the policy had a choice."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def top_entropy(entropy: Float[Array, "*b t"], mask: Float[Array, "*b t"], *, share: float) -> Float[Array, "*b t"]:
    """Return 1 for the tokens of each response whose entropy is at or above its (1 - share) quantile, 0 for the others.

    Wang et al., 2025, arXiv 2506.01939: a fifth of the tokens, those where the text forks, carries what is learnt. The quantile is that of
    one response, linear between tokens, so that neither micro-batches nor devices change it (TRL 1.16: of a micro-batch on all devices).

    Args:
      entropy: in nats.
      mask: tokens that count.
      share: in (0, 1].
    """
    largest = jnp.finfo(entropy.dtype).max  # the threshold of a response without tokens, which none reaches
    ordered = jnp.sort(jnp.where(mask > 0, entropy, largest), axis=-1)
    last = jnp.maximum(jnp.sum(mask > 0, axis=-1, keepdims=True) - 1, 0)
    # A little below, so that rounding does not lose the token that is the threshold.
    place = jnp.maximum((1 - share) * last.astype(entropy.dtype) - 1e-4, 0)
    below = jnp.floor(place).astype(last.dtype)
    low, high = (jnp.take_along_axis(ordered, at, axis=-1) for at in (below, jnp.minimum(below + 1, last)))
    threshold = low + (place - below.astype(place.dtype)) * (high - low)
    return ((entropy >= threshold) & (mask > 0)).astype(mask.dtype)
