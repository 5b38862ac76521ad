"""Learning from which of two new responses is better, one the policy's own; online DPO is `dpo` of two of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.losses.options import check_weight
from ftjax.losses.policy_gradient import diagnose_actions, read_actions
from ftjax.losses.preference import preference
from ftjax.losses.reductions import sequence_sum
from ftjax.losses.reference import reference_logps
from ftjax.losses.responses import token_sum
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def xpo(scores: Scores, batch: Batch, *, beta: float = 0.1, alpha: float = 1e-5) -> tuple[Mean, Metrics]:
    """Return DPO's loss of a response of the policy and one of its reference, plus α log π(y_ref), a mean over pairs.

    Xie et al., 2024, arXiv 2405.21046: the second term takes probability from what the reference says already, which is optimism about
    everything else.

    Args:
      scores: of the policy, `[b, 2, t]`: the policy's response first, the reference's second.
      batch: with `reference_logps` and `desirable` `[b]`: 1 where the policy's response is the better one.
      beta: > 0, of DPO.
      alpha: α ≥ 0.

    Returns:
      The loss and the metrics of `diagnosis.diagnose`, with `wins`: how often the policy's response was better, and `logps/reference`: of
      the reference's responses.

    Raises:
      ValueError: there is no reference, no `desirable`, or the rows are no pairs.
    """
    if batch.desirable is None or scores.logps.ndim != 3:
        raise ValueError(
            f"xpo: expected batch.desirable [b] and log-probabilities [b, 2, t], got {batch.desirable} and {scores.logps.shape}."
        )
    better = batch.desirable[:, None, None] > 0
    chosen_first = lambda x: None if x is None else jnp.where(better, x, x[:, ::-1])  # noqa: E731
    ordered = Scores(chosen_first(scores.logps), chosen_first(scores.entropy))
    anchor = reference_logps("xpo", batch)
    pairs = dataclasses.replace(batch, loss_mask=chosen_first(batch.loss_mask), reference_logps=chosen_first(anchor))
    loss, metrics = preference(ordered, pairs, beta=beta)
    counted = jnp.all(jnp.sum(batch.loss_mask, axis=-1) > 0, axis=-1).astype(batch.loss_mask.dtype)
    said = masked_mean(token_sum(scores.logps[:, 1], batch.loss_mask[:, 1]), counted)
    metrics |= {"wins": masked_mean(batch.desirable.astype(counted.dtype), counted), "logps/reference": jax.lax.stop_gradient(said)}
    return Mean(loss.total + alpha * said.total, loss.weight), metrics


def nash_md(scores: Scores, batch: Batch, *, beta: float = 0.1) -> tuple[Mean, Metrics]:
    """Return Σ_t [ β sg(log π/π_ref) - (p - ½) ] log π(y_t), a mean over responses: one step of mirror descent towards a Nash equilibrium.

    p is the probability that the policy's response beats one of the mixture π^(1-m) π_ref^m, sg stops the gradient. Munos et al., 2023,
    arXiv 2312.00886; the mixture is sampled from where the responses are, m is TRL's 0.5.

    Args:
      scores: of the policy, `[b, t]`, on its own responses.
      batch: with `reference_logps`, and p - ½ as `advantages`, `[b]`.
      beta: ≥ 0, of the KL divergence from the reference.

    Returns:
      The loss and the metrics of `policy_gradient.diagnose_actions`.

    Raises:
      ValueError: there is no reference, there are no advantages, or β is below 0.
    """
    check_weight("nash_md", "beta", beta)
    anchor = reference_logps("nash_md", batch)
    actions = read_actions("nash_md", scores, batch)
    moved = jax.lax.stop_gradient(actions.logps - jnp.where(batch.loss_mask > 0, anchor, 0))
    loss = sequence_sum((beta * moved - actions.advantages) * actions.logps, batch.loss_mask)
    return loss, diagnose_actions(scores, batch, actions, {})
