"""What a run on pairs says of itself: the numbers behind "both log-probs fall", "the loss is 0" and "accuracy stays at 0.5"."""

from __future__ import annotations

import dataclasses
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
      counted: 0 for a pair that only fills the batch, or in which a response has no token: it counts in no metric.

    Returns:
      `rewards/{chosen,rejected,margin}`; `rewards/square` and `rewards/margin_square`: the means of r² over both responses and of the
      margin's square, which with the means give their spread; `rewards/accuracy`, where a tie counts one half, so that two equal policies
      have 0.5 (TRL: 0); `logratio/{chosen,rejected}`: log π(y)/π_ref(y) in nats, below 0 where a response has become less likely;
      `logps/{chosen,rejected}`: log-probabilities of whole responses, which both fall under likelihood displacement;
      `length/{chosen,rejected}` in tokens; `saturated`: the share of pairs with a margin beyond `SATURATED`, either way wrong or right;
      `nll`: of the chosen responses' tokens; `kl`: see `distance`; `entropy` where scored.
    """
    margin = chosen_rewards - rejected_rewards
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask * counted[:, None, None])
    logps, lengths = token_sum(scores.logps, batch.loss_mask), jnp.sum(batch.loss_mask, axis=-1)
    found = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margin": margin,
        "rewards/accuracy": (jnp.sign(margin) + 1) / 2,
        "rewards/square": (jnp.square(chosen_rewards) + jnp.square(rejected_rewards)) / 2,
        "rewards/margin_square": jnp.square(margin),
        "saturated": (jnp.abs(margin) > SATURATED).astype(margin.dtype),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "length/chosen": lengths[:, 0],
        "length/rejected": lengths[:, 1],
    }
    metrics = {name: masked_mean(value, counted) for name, value in found.items()}
    metrics["nll"] = masked_mean(-scores.logps[:, 0], batch.loss_mask[:, 0])
    if batch.reference_logps is not None:
        logratios = token_sum(scores.logps - batch.reference_logps, batch.loss_mask)
        metrics |= {f"logratio/{side}": masked_mean(logratios[:, n], counted) for n, side in enumerate(("chosen", "rejected"))}
        metrics["kl"] = distance(scores, batch)
    if scores.entropy is not None:
        metrics["entropy"] = masked_mean(scores.entropy, batch.loss_mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)


def distance(scores: Scores, batch: Batch) -> Mean:
    """Return ½ (log π - log π_ref)² per token (Schulman's k2).

    It is the KL divergence to second order where the responses are the policy's own, and a distance that cannot be negative elsewhere.
    """
    return masked_mean(jnp.square(scores.logps - batch.reference_logps) / 2, batch.loss_mask)


def gradient_share(nll: Float[Array, " b"], pair: Float[Array, " b"], counted: Float[Array, " b"]) -> Mean:
    """Return the part of the pull on log-probabilities that is the NLL's, in [0, 1].

    Args:
      nll: the size of the gradient of the NLL term in the log-probability of the response that each pair imitates.
      pair: the size of that of the preference term in the chosen response's, both of sums over tokens or both per token.
      counted: 1 where the pair counts.
    """
    total = nll + pair
    return jax.lax.stop_gradient(masked_mean(nll / jnp.where(total > 0, total, 1), counted))
