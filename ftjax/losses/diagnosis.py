"""What a run on pairs says of itself: the numbers behind "both log-probs fall", "the loss is 0" and "accuracy stays at 0.5"."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.responses import token_sum
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean

SATURATED = math.log(99)
"""The margin βΔ at which the gradient of -log σ, σ(-βΔ), is 1 % of its largest: such a pair teaches nothing more."""


def diagnose(
    scores: Scores, batch: Batch, chosen_rewards: Float[Array, " b"], rejected_rewards: Float[Array, " b"], counted: Float[Array, " b"]
) -> Metrics:
    """Return the metrics of pairs `[b, 2, t]`, each a mean over pairs unless it says tokens.

    Args:
      scores: of the policy.
      batch: the pairs.
      chosen_rewards: the implicit rewards.
      rejected_rewards: likewise.
      counted: 0 for a pair that only fills the batch.

    Returns:
      `rewards/{chosen,rejected,margin}`; `rewards/accuracy`, where a tie counts one half, so that two equal policies have 0.5 (TRL: 0);
      `logps/{chosen,rejected}`: log-probabilities of whole responses, which both fall under likelihood displacement;
      `length/{chosen,rejected}` in tokens; `saturated`: the share of pairs with a margin beyond `SATURATED`, either way wrong or right;
      `nll`: of the chosen responses' tokens; `kl`: ½ (log π - log π_ref)² per token (Schulman's k2), which is the KL divergence to second
      order where the responses are the policy's own, and a distance that cannot be negative elsewhere; `entropy` where scored.
    """
    margin = chosen_rewards - rejected_rewards
    logps, lengths = token_sum(scores.logps, batch.loss_mask), jnp.sum(batch.loss_mask, axis=-1)
    found = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margin": margin,
        "rewards/accuracy": (jnp.sign(margin) + 1) / 2,
        "saturated": (jnp.abs(margin) > SATURATED).astype(margin.dtype),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "length/chosen": lengths[:, 0],
        "length/rejected": lengths[:, 1],
    }
    metrics = {name: masked_mean(value, counted) for name, value in found.items()}
    metrics["nll"] = masked_mean(-scores.logps[:, 0], batch.loss_mask[:, 0])
    if batch.reference_logps is not None:
        metrics["kl"] = masked_mean(jnp.square(scores.logps - batch.reference_logps) / 2, batch.loss_mask)
    if scores.entropy is not None:
        metrics["entropy"] = masked_mean(scores.entropy, batch.loss_mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)


def gradient_share(nll: Float[Array, " b"], pair: Float[Array, " b"], counted: Float[Array, " b"]) -> Mean:
    """Return the part of the pull on the chosen responses' log-probabilities that is the NLL's, in [0, 1].

    Args:
      nll: the size of the gradient of the NLL term in the chosen log-probability of each pair.
      pair: the size of that of the preference term.
      counted: 1 where the pair counts.
    """
    total = nll + pair
    return masked_mean(nll / jnp.where(total > 0, total, 1), counted)
