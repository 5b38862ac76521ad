"""ORPO: fine-tuning on the chosen response and the odds ratio of the two in one loss, without a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.losses.diagnosis import diagnose, gradient_share
from ftjax.losses.options import check_weight
from ftjax.losses.preference import make_pairs
from ftjax.losses.responses import token_average
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def orpo(scores: Scores, batch: Batch, *, beta: float = 0.1, min_gap: float = 1e-6) -> tuple[Mean, Metrics]:
    """Return NLL(y_c) - β log σ( log odds(y_c) - log odds(y_r) ), a mean over pairs.

    odds(y) = p / (1 - p), log p = mean_t log π(y_t)

    Hong, Lee and Thorne, 2024, arXiv 2403.07691, where β is called λ. As there, the NLL is that of the response per token. TRL takes it
    over the prompt too, and over the tokens of a micro-batch. There is no option for either: scores are of the tokens that `loss_mask`
    counts, and so of no prompt, and a mean over the tokens of a micro-batch changes with the split.

    Args:
      scores: of the policy, `[b, 2, t]`, chosen first.
      batch: a pair in which a response has no token counts nowhere.
      beta: ≥ 0, weight of the odds ratio; at 0 it is `sft` of the chosen responses.
      min_gap: log p is taken as -min_gap at least: the odds of a certain response are infinite.

    Returns:
      The loss and the metrics of `diagnosis.diagnose`, with rewards β log p; `log_odds_ratio`, and `nll/share`, the NLL's part of the
      gradient.

    Raises:
      ValueError: β is below 0, or the rows are no pairs.

    Example:
      >>> pair = jnp.zeros((1, 2, 3))
      >>> batch = Batch(pair.astype(int), pair + 1, pair.astype(int), pair.astype(int) + 1)
      >>> loss, _ = orpo(Scores(logps=pair - 1), batch)
      >>> round(loss.value(), 4)
      1.0693
    """
    check_weight("orpo", "beta", beta)
    counted = make_pairs(scores.logps, jnp.zeros_like(scores.logps), batch.loss_mask).counted
    chosen, rejected = token_average(scores.logps, batch.loss_mask).T

    def odds_loss(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
        ratio = _log_odds(chosen, min_gap) - _log_odds(rejected, min_gap)
        return -beta * jax.nn.log_sigmoid(ratio), ratio

    loss, ratio = odds_loss(chosen, rejected)
    pull = jax.grad(lambda x: jnp.sum(odds_loss(x, rejected)[0]))(chosen)
    metrics = diagnose(scores, batch, beta * chosen, beta * rejected, counted)
    metrics["log_odds_ratio"] = jax.lax.stop_gradient(masked_mean(ratio, counted))
    metrics["nll/share"] = gradient_share(jnp.ones_like(chosen), jnp.abs(pull), counted)
    return masked_mean(loss - chosen, counted), metrics


def _log_odds(logp: jax.Array, min_gap: float) -> jax.Array:
    """Return log p - log(1 - p); near p = 1 and near 0 the two forms of log(1 - e^x) keep their digits."""
    logp = jnp.minimum(logp, -min_gap)
    return logp - jnp.where(logp < -0.693, jnp.log1p(-jnp.exp(logp)), jnp.log(-jnp.expm1(logp)))
