"""Policy-gradient surrogates: small functions of how likely drawn tokens have become and of how good they were.

ρ_t = π(y_t) / π_old(y_t) is the ratio, A_t the advantage. Each surrogate takes `Actions` and returns one loss a token, with what it
clipped; `losses.policy_gradient` adds the rest. Where ρ = 1 they all have the gradient -A_t ∇log π(y_t).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ftjax.losses.divergences import EXPONENT_CAP
from ftjax.losses.responses import token_average


class Actions(NamedTuple):
    """What is known of drawn tokens."""

    logps: Float[Array, "*b t"]
    """log π(y_t)."""
    logratio: Float[Array, "*b t"]
    """log π(y_t) - log π_old(y_t), or another log-ratio of `levels`."""
    advantages: Float[Array, "*b t"]
    mask: Float[Array, "*b t"]

    @property
    def ratio(self) -> Float[Array, "*b t"]:
        return capped_exp(self.logratio)


Clips = dict[str, Bool[Array, "*b t"]]
"""By name, whether a surrogate clipped there."""


def capped_exp(x: Float[Array, "*b"], *, cap: float = EXPONENT_CAP) -> Float[Array, "*b"]:
    """Return e^x up to `cap`, and its tangent there beyond: a ratio to what was all but impossible stays finite, with a gradient."""
    return jnp.exp(jnp.minimum(x, cap)) * (1 + jnp.maximum(x - cap, 0))


def unclipped(actions: Actions) -> tuple[Float[Array, "*b t"], Clips]:
    """Return -ρA: REINFORCE (Williams, 1992), importance-weighted where the tokens are those of an earlier policy."""
    return -actions.ratio * actions.advantages, {}


def clipped(
    actions: Actions, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float | None = None
) -> tuple[Float[Array, "*b t"], Clips]:
    """Return -min( min(ρ, δ) A, clip(ρ, 1-ε_low, 1+ε_high) A ): no gain from moving further than the clip, a loss for moving back.

    Schulman et al., 2017, arXiv 1707.06347, equation 7; ε_high ≠ ε_low: DAPO, Yu et al., 2025, arXiv 2503.14476; δ, which bounds the loss
    where A < 0: dual clip, Ye et al., 2020, arXiv 1912.09729, where verl and NeMo RL call it c and also take
    one between 1 and 1 + ε_high.

    Args:
      actions: the drawn tokens.
      clip_low: ε_low in [0, 1].
      clip_high: ε_high ≥ 0.
      ratio_cap: δ > 1 + ε_high; none if None.
    """
    ratio, advantages = actions.ratio, actions.advantages
    low, high = 1 - clip_low, 1 + clip_high
    if ratio_cap is not None and ratio_cap <= high:
        raise ValueError(f"clipped: ratio_cap is above 1 + clip_high = {high}, not {ratio_cap}: it bounds what the clip leaves open.")
    bounded = ratio if ratio_cap is None else jnp.minimum(ratio, ratio_cap)
    loss = -jnp.minimum(bounded * advantages, jnp.clip(ratio, low, high) * advantages)
    clips = {"low": (ratio < low) & (advantages < 0), "high": (ratio > high) & (advantages > 0)}
    if ratio_cap is not None:
        clips["cap"] = (ratio > ratio_cap) & (advantages < 0)
    return loss, clips


def cispo(actions: Actions, *, clip_low: float = 1.0, clip_high: float = 4.0) -> tuple[Float[Array, "*b t"], Clips]:
    """Return -sg( clip(ρ, 1-ε_low, 1+ε_high) ) A log π: the weight is clipped and no token loses its gradient.

    sg stops the gradient. CISPO, MiniMax, 2025, arXiv 2506.13585. TRL's `epsilon_high` is 1 + ε_high.

    Args:
      actions: the drawn tokens.
      clip_low: ε_low; at 1 there is no lower bound, as in the paper's runs.
      clip_high: ε_high ≥ 0.
    """
    ratio, (low, high) = actions.ratio, (1 - clip_low, 1 + clip_high)
    weights = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    return -weights * actions.advantages * actions.logps, {"low": ratio < low, "high": ratio > high}


def sapo(actions: Actions, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> tuple[Float[Array, "*b t"], Clips]:
    """Return -(4/τ) σ(τ(ρ - 1)) A, a soft clip, with a τ of its own for each sign of A: SAPO, Gao et al., 2025, arXiv 2511.20347.

    Args:
      actions: the drawn tokens.
      tau_positive: τ > 0 where A > 0; larger closes sooner.
      tau_negative: τ elsewhere.
    """
    tau = jnp.where(actions.advantages > 0, tau_positive, tau_negative).astype(actions.advantages.dtype)
    return -4 / tau * jax.nn.sigmoid(tau * (actions.ratio - 1)) * actions.advantages, {}


def vespo(
    actions: Actions, *, powers: tuple[float, float] = (2.0, 3.0), decays: tuple[float, float] = (3.0, 2.0)
) -> tuple[Float[Array, "*b t"], Clips]:
    """Return -sg(φ(ρ)) A log π, φ(ρ) = ρ^k e^(λ(1 - ρ)): a weight that is 1 at ρ = 1 and goes to 0 on either side of it.

    VESPO, 2026, arXiv 2602.10693, where ρ is of the whole response: level "response".

    Args:
      actions: the drawn tokens.
      powers: k > 0 where A ≥ 0, and elsewhere.
      decays: λ > 0 where A ≥ 0, and elsewhere.
    """
    k, decay = (jnp.where(actions.advantages >= 0, *x).astype(actions.logps.dtype) for x in (powers, decays))
    weights = jax.lax.stop_gradient(jnp.exp(k * actions.logratio + decay * (1 - actions.ratio)))
    return -weights * actions.advantages * actions.logps, {}


def gmpo(actions: Actions, *, clip_low: float = 0.4, clip_high: float = 0.4) -> tuple[Float[Array, "*b t"], Clips]:
    """Return -exp( mean_t clip(log ρ_t) ) A: the geometric mean of a response's ratios, clipped in log space against the sign of A.

    clip is min(·, ε_high) where A > 0 and max(·, -ε_low) elsewhere. GMPO, Zhao et al., 2025, arXiv 2507.20673. Every token of a response
    has the same loss.
    """
    x, advantages = actions.logratio, actions.advantages
    kept = jnp.where(advantages > 0, jnp.minimum(x, clip_high), jnp.maximum(x, -clip_low))
    ratio = capped_exp(token_average(kept, actions.mask))[..., None]
    clips = {"low": (x < -clip_low) & (advantages < 0), "high": (x > clip_high) & (advantages > 0)}
    return -jnp.broadcast_to(ratio, x.shape) * advantages, clips


SURROGATES = {"unclipped": unclipped, "clipped": clipped, "cispo": cispo, "sapo": sapo, "vespo": vespo, "gmpo": gmpo}


def token(logratio: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return each token's own log-ratio."""
    del mask
    return logratio


def sequence(logratio: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return for every token the mean log-ratio of its response: GSPO, Zheng et al., 2025, arXiv 2507.18071."""
    return jnp.broadcast_to(token_average(logratio, mask)[..., None], logratio.shape)


def sequence_token(logratio: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return the value of `sequence` with each token's own gradient: GSPO-token, of the same paper."""
    return jax.lax.stop_gradient(sequence(logratio, mask) - logratio) + logratio


def response(logratio: Float[Array, "*b t"], mask: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Return for every token the log-ratio of its response as a whole, the sum: RLOO, Ahmadian et al., 2024, arXiv 2402.14740."""
    return jnp.broadcast_to(jnp.sum(logratio * mask, axis=-1)[..., None], logratio.shape)


LEVELS = {"token": token, "sequence": sequence, "sequence_token": sequence_token, "response": response}
"""Of which log-ratio ρ is made."""
