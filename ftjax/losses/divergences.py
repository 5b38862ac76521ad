"""What takes the place of the log-ratio when another divergence than the reverse KL ties the policy to its reference.

The optimum of max E[r] - β·D_f(π ‖ π_ref) satisfies r = β·f'(π / π_ref) + const; so the implicit reward of a response is β·f' of its
ratio, and every loss of a pair reads f'(e^x) where it read the log-ratio x. Wang et al., 2023, arXiv 2309.16240.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EXPONENT_CAP = 20.0
"""Above it an exponential goes on as its tangent: a log-ratio of -1e4 still has a finite reward and a gradient."""


def capped_expm1(x: Float[Array, "*b"], *, cap: float = EXPONENT_CAP) -> Float[Array, "*b"]:
    """Return e^x - 1 up to `cap`, and its tangent there beyond: increasing, convex and finite, and exact around 0."""
    below = jnp.minimum(x, cap)
    return jnp.expm1(below) + jnp.exp(below) * jnp.maximum(x - cap, 0)


def reverse_kl(logratio: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return x: f(u) = u log u, up to a constant that no margin sees; DPO as it is."""
    return logratio


def forward_kl(logratio: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return 1 - e^-x: f(u) = -log u, up to a constant."""
    return -capped_expm1(-logratio)


def js(logratio: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return log 2u / (1 + u) = log 2 + log σ(x): Jensen–Shannon."""
    return math.log(2) + jax.nn.log_sigmoid(logratio)


def alpha(logratio: Float[Array, "*b"], *, order: float = 0.5) -> Float[Array, "*b"]:
    """Return (e^((a-1)·x) - 1) / (a - 1): the α-divergence of order a, which is the reverse KL at 1 and the forward KL at 0."""
    if abs(order - 1) < 1e-6:
        return reverse_kl(logratio)
    return capped_expm1((order - 1) * logratio) / (order - 1)


DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js": js, "alpha": alpha}
