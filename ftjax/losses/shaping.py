"""What is done to rewards and masks before advantages are estimated: penalties for divergence and for no end, and which token is paid.

Pure functions of arrays, `[*b]` one a response and `[*b, t]` one a token, without a gradient.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ftjax.losses.responses import Given, token_sum


def token_rewards(
    rewards: Float[Given, "*b"], kl: Float[Given, "*b t"], mask: Float[Given, "*b t"], *, kl_coef: float | np.floating | Float[Array, ""]
) -> Float[Array, "*b t"]:
    """Return -c kl_t for every token that counts, and the reward of the response at the last of them as well.

    Ziegler et al., 2019, arXiv 1909.08593; Ouyang et al., 2022, arXiv 2203.02155, equation 2. TRL 1.12 pays the token after
    the last one, if there is room, and learns the value of its state; that is what a mask of one token more says here. It changes no
    advantage where γ = λ = 1.

    Args:
      rewards: of each response.
      kl: an estimator of `losses.kl` of log π_old - log π_ref; k1 as in both papers.
      mask: tokens that count.
      kl_coef: c ≥ 0, which may change from step to step: see `adaptive_kl_coef`.
    """
    counts = mask > 0
    last = counts & (jnp.cumsum(mask, axis=-1) == jnp.sum(mask, axis=-1, keepdims=True))
    return jnp.where(counts, -kl_coef * kl, 0) + jnp.where(last, rewards[..., None], 0)


def response_rewards(
    rewards: Float[Given, "*b"], kl: Float[Given, "*b t"], mask: Float[Given, "*b t"], *, kl_coef: float | np.floating | Float[Array, ""]
) -> Float[Array, "*b"]:
    """Return the reward of each response minus c Σ_t kl_t: RLOO's, Ahmadian et al., 2024, arXiv 2402.14740."""
    return rewards - kl_coef * token_sum(kl, mask)


def adaptive_kl_coef(coef: float | Float[Array, ""], kl: float | Float[Array, ""], *, target: float, gain: float = 0.1) -> Float[Array, ""]:
    """Return c (1 + K clip(kl / target - 1, -0.2, 0.2)): the coefficient of the next step.

    Ziegler et al., 2019, arXiv 1909.08593, section 2.2. verl's K is the number of samples over a horizon.

    Args:
      coef: c of this step.
      kl: the divergence that it led to, summed over a response, a mean over responses.
      target: what it should be, > 0.
      gain: K > 0.
    """
    return coef * (1 + gain * jnp.clip(kl / target - 1, -0.2, 0.2))


def less_unfinished(rewards: Float[Given, "*b"], finished: Shaped[Array, "*b"], *, penalty: float) -> Float[Array, "*b"]:
    """Return the rewards, less a penalty where a response ran out of tokens before its end.

    Args:
      rewards: of each response.
      finished: 1 where the response ended by itself.
      penalty: ≥ 0; 1 is usual in TRL's PPO, where nothing else teaches a model to stop.
    """
    return rewards - penalty * (1 - finished.astype(rewards.dtype))


def clip_rewards(rewards: Float[Given, "*b"], *, low: float = -10.0, high: float = 10.0) -> Float[Array, "*b"]:
    """Return the rewards between two bounds, so that one of a reward model's outliers moves no step; OpenRLHF's are ±10."""
    return jnp.clip(rewards, low, high)


def without_unfinished(mask: Float[Given, "*b t"], finished: Shaped[Array, "*b"]) -> Float[Array, "*b t"]:
    """Return the mask without the responses that ran out of tokens, whose reward says nothing of them.

    Over-long filtering: DAPO, Yu et al., 2025, arXiv 2503.14476, section 3.4. Such a response counts in no denominator either.
    """
    return mask * finished.astype(mask.dtype)[..., None]


def state_values(values: Float[Given, "*b t"]) -> Float[Array, "*b t"]:
    """Return of `Scores.values` the value of the state that each token was drawn in: that of the token before it."""
    return jnp.pad(values[..., :-1], [(0, 0)] * (values.ndim - 1) + [(1, 0)])
