"""From one loss a token to one a step: which tokens and responses weigh how much.

Each returns a `Mean`, so normalisers are those of the whole step, whatever micro-batch, row or device a token is on. A response without a
token that counts (a row that fills the batch, an over-long response that was masked) counts in no denominator. verl's `token-sum`, whose
scale grows with the batch, is not here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.responses import token_average, token_sum
from ftjax.types import Mean, masked_mean


def token_mean(losses: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Mean:
    """Return the mean over all tokens: a long response weighs more. BNPO, DAPO (Yu et al., 2025, arXiv 2503.14476), CISPO."""
    return masked_mean(losses, mask)


def sequence_mean(losses: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Mean:
    """Return the mean over responses of their means over tokens: a token of a long response weighs less. GRPO."""
    return masked_mean(token_average(losses, mask), _counted(mask))


def sequence_sum(losses: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Mean:
    """Return the mean over responses of their sums over tokens: the policy gradient as it is derived. REINFORCE, LUSPO."""
    return masked_mean(token_sum(losses, mask), _counted(mask))


def constant_length(losses: Float[Array, "*b t"], mask: Float[Array, "*b t"], *, max_tokens: float = 512.0) -> Mean:
    """Return `sequence_sum` divided by a constant: Dr. GRPO, Liu et al., 2025, arXiv 2503.20783.

    verl's `seq-mean-token-sum-norm`, which older versions do not divide by the number of responses.

    Args:
      losses: of each token.
      mask: tokens that count.
      max_tokens: the constant, which only scales the loss; the most tokens that a response may have, by custom, and in a run unless it is
        told otherwise.
    """
    return masked_mean(token_sum(losses, mask) / max_tokens, _counted(mask))


def _counted(mask: Float[Array, "*b t"]) -> Float[Array, "*b"]:
    return (jnp.sum(mask, axis=-1) > 0).astype(mask.dtype)


REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "sequence_sum": sequence_sum, "constant_length": constant_length}
