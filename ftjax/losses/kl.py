"""The KL divergence of a policy from its reference, estimated from the tokens that were drawn.

Each estimator reads x = log π(y_t) - log π_ref(y_t) and returns one number a token, whose mean over y_t ~ π is KL(π ‖ π_ref) or near it.
The gradients are another matter (Tang and Munos, 2025, arXiv 2506.09477): that of k1 is 0 in the mean, so that k1 as a loss holds nothing
back; that of k2 is the divergence's; that of k3 is the one of KL(π_ref ‖ π). Multiplied by the ratio π / π_old, as `policy_gradient` does
unless told otherwise, the gradients of k1 and k3 become the divergence's too.

TRL multiplies by the ratio too, verl never, and NeMo RL, if asked, by a π / π_behavior without a gradient. verl's k3 and, by default,
all of NeMo RL's end at 10, where they lose their gradient: k3 gets there at x = -2.6, and a token that moved further is held no more. Here
nothing is cut. verl's `abs`, |x|, estimates no divergence and is left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.divergences import capped_expm1


def k1(logratio: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return x: unbiased, of either sign, of large variance."""
    return logratio


def k2(logratio: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return x²/2: never negative, biased away from the reference."""
    return jnp.square(logratio) / 2


def k3(logratio: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return e^-x - 1 + x: unbiased and never negative; below x = -20 the exponential goes on as its tangent."""
    return capped_expm1(-logratio) + logratio


def straight_through(value: Float[Array, "*b t"], logratio: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return `value` with the gradient of k2, which is that of the divergence where the tokens are the policy's own."""
    surrogate = k2(logratio)
    return surrogate - jax.lax.stop_gradient(surrogate) + jax.lax.stop_gradient(value)


def k1_straight_through(logratio: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return k1 with the gradient of k2; verl's `k1+`."""
    return straight_through(k1(logratio), logratio)


def k3_straight_through(logratio: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return k3 with the gradient of k2; verl's `k3+`."""
    return straight_through(k3(logratio), logratio)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k1+": k1_straight_through, "k3+": k3_straight_through}
