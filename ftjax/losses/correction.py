"""Importance weights for tokens that another policy drew than the one that is trained: w = π_old / π_behavior, bounded.

The sampler's log-probabilities differ from the trainer's by its kernels, its precision, or the steps that it lags behind. A weight is of
one token or of a whole response, and one that is too large is truncated or leaves its tokens out. Truncated and of a token: Yao et al.,
2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL 1.16 has the same four.
verl and NeMo RL have the truncated ones and IcePop; verl's division by the mean weight and NeMo RL's mask of responses by their mean
log-ratio (`seq-mask-tis`) are not here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.responses import token_average
from ftjax.losses.surrogates import capped_exp

LEAST = 0.0
"""No lower bound: a token that the trainer finds unlikely weighs little by itself."""


def token_truncate(logratio: Float[Array, "*b t"], *, cap: float = 3.0, floor: float = LEAST) -> Float[Array, "*b t"]:
    """Return each token's w between `floor` and `cap`, of log w."""
    return jnp.clip(capped_exp(logratio), floor, cap)


def token_mask(logratio: Float[Array, "*b t"], *, cap: float = 3.0, floor: float = LEAST) -> Float[Array, "*b t"]:
    """Return each token's w, and 0 where it is beyond `floor` or `cap`: IcePop."""
    return _within(capped_exp(logratio), cap, floor)


def sequence_truncate(logratio: Float[Array, "*b t"], *, cap: float = 3.0, floor: float = LEAST) -> Float[Array, "*b t"]:
    """Return the product of a response's w between `floor` and `cap`, for each of its tokens."""
    return jnp.clip(_product(logratio), floor, cap)


def sequence_mask(logratio: Float[Array, "*b t"], *, cap: float = 3.0, floor: float = LEAST) -> Float[Array, "*b t"]:
    """Return the product of a response's w, and 0 where it is beyond `floor` or `cap`."""
    return _within(_product(logratio), cap, floor)


CORRECTIONS = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}
"""Functions of log π_old - log π_behavior, which is 0 where the mask is."""


def off_policy_mask(
    logps: Float[Array, "*b t"],
    behavior: Float[Array, "*b t"],
    advantages: Float[Array, "*b t"],
    mask: Float[Array, "*b t"],
    *,
    threshold: float,
) -> Float[Array, "*b t"]:
    """Return 0 for the tokens of a bad response that the policy has left behind, and 1 for all others.

    Left behind: mean_t [ log π_behavior - log π ] > `threshold`; bad: A < 0. DeepSeek-AI, 2025, "DeepSeek-V3.2", arXiv 2512.02556.
    """
    moved = token_average(behavior - jax.lax.stop_gradient(logps), mask)[..., None]
    return ((advantages >= 0) | (moved <= threshold)).astype(mask.dtype)


def _product(logratio: jax.Array) -> jax.Array:
    return jnp.broadcast_to(capped_exp(jnp.sum(logratio, axis=-1, keepdims=True)), logratio.shape)


def _within(weights: jax.Array, cap: float, floor: float) -> jax.Array:
    return jnp.where((weights >= floor) & (weights <= cap), weights, 0)
