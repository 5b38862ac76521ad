"""TPO: of three responses two are compared and the third, the best known one, is imitated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.losses.diagnosis import diagnose, gradient_share
from ftjax.losses.options import check_beta
from ftjax.losses.responses import likelihood, token_sum, token_weights
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def tpo(scores: Scores, batch: Batch, *, beta: float = 0.01, nll_coef: float = 1.0, nll_per_token: bool = True) -> tuple[Mean, Metrics]:
    """Return -log σ( β [log π(y_c) - log π(y_r)] ) + c · NLL(y_gold), a mean over triples.

    Saeidi et al., 2024, arXiv 2405.16681. The NLL is that of the gold response per token; the paper's sum over the response is
    `nll_per_token=False`. TRL takes it over the tokens of a micro-batch, for which there is no option: it changes with the split.

    Args:
      scores: of the policy, `[b, 3, t]`: chosen, rejected, gold.
      batch: a triple in which one of the three has no token counts nowhere.
      beta: > 0, the scale of a log-probability.
      nll_coef: weight of the NLL.
      nll_per_token: whether that is divided by the response's length.

    Returns:
      The loss and the metrics of `diagnosis.diagnose`, where `nll` is the gold response's, with `nll/share` where it has a coefficient: its
      part of the pull on a token of the gold response and on one of the chosen response together.

    Raises:
      ValueError: the rows are no triples, or β is not above 0.

    Example:
      >>> triple = jnp.zeros((1, 3, 2))
      >>> batch = Batch(triple.astype(int), triple + 1, triple.astype(int), triple.astype(int) + 1)
      >>> loss, _ = tpo(Scores(logps=triple - 1), batch)
      >>> round(loss.value(), 4)
      1.6931
    """
    check_beta("tpo", beta)
    scale = jnp.full(batch.loss_mask.shape[:-1], beta, scores.logps.dtype)
    return _against_gold(scores, batch, scale, 0.0, nll_coef, nll_per_token)


def tpo_l(
    scores: Scores, batch: Batch, *, beta: float = 2.0, margin: float = 0.5, nll_coef: float = 1.0, nll_per_token: bool = True
) -> tuple[Mean, Metrics]:
    """Return `tpo` with SimPO's comparison: log-probabilities per token, and a margin γ that the chosen response has to be better by."""
    check_beta("tpo_l", beta)
    scale = beta / jnp.maximum(jnp.sum(batch.loss_mask, axis=-1), 1)
    return _against_gold(scores, batch, scale, margin, nll_coef, nll_per_token)


def _against_gold(
    scores: Scores, batch: Batch, scale: jax.Array, margin: float, nll_coef: float, nll_per_token: bool
) -> tuple[Mean, Metrics]:
    """Return the loss where the reward of a response is its `scale`, `[b, 3]`, times its log-probability."""
    if scores.logps.ndim != 3 or scores.logps.shape[1] != 3:
        raise ValueError(f"tpo: expected log-probabilities [b, 3, t] of chosen, rejected and gold responses, got {scores.logps.shape}.")
    mask = batch.loss_mask
    counted = jnp.all(jnp.sum(mask, axis=-1) > 0, axis=-1).astype(mask.dtype)
    chosen, rejected, _ = (scale * token_sum(scores.logps, mask)).T
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin) - nll_coef * likelihood(scores.logps, mask, per_token=nll_per_token)[:, 2]
    compared = Scores(scores.logps[:, :2], entropy=None if scores.entropy is None else scores.entropy[:, :2])
    metrics = diagnose(compared, dataclasses.replace(batch, loss_mask=mask[:, :2], reference_logps=None), chosen, rejected, counted)
    metrics["nll"] = jax.lax.stop_gradient(masked_mean(-scores.logps[:, 2], mask[:, 2] * counted[:, None]))
    if nll_coef:
        pull = scale[:, 0] * jax.nn.sigmoid(margin + rejected - chosen)
        lengths = jnp.maximum(jnp.sum(mask[:, 2], axis=-1), 1)
        metrics["nll/share"] = gradient_share(nll_coef * token_weights(lengths, per_token=nll_per_token), pull, counted)
    return masked_mean(loss, counted), metrics
