"""Unlearning: making a model forget given texts and keep the rest; `desirable` says which rows are to be kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.losses.kto import describe, read
from ftjax.losses.options import check_beta
from ftjax.losses.responses import token_average
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def npo(scores: Scores, batch: Batch, *, beta: float = 0.1, retain_coef: float = 1.0) -> tuple[Mean, Metrics]:
    """Return -(2/β) log σ(-βx) for a row to forget and c · NLL for a row to keep, a mean over rows.

    x = log π(y) - log π_ref(y). Negative preference optimisation, Zhang et al., 2024, arXiv 2404.05868: DPO with a rejected response
    alone. Its gradient is that of gradient ascent, times 2 σ(βx), which goes to 0 as the text is forgotten. With rows to keep it is the
    paper's NPO + RT.

    Args:
      scores: of the policy, `[b, t]`.
      batch: with `reference_logps` and `desirable`: 0 for a row to forget, 1 for one to keep.
      beta: > 0; at 0 it would be gradient ascent.
      retain_coef: c, of the NLL per token of the rows to keep.

    Returns:
      The loss, and the metrics of `kto` without its baseline; `logps/undesirable` is what has to fall.

    Raises:
      ValueError: reference or labels are missing, or β is not above 0.
    """
    check_beta("npo", beta)
    logratios, keep, counted = read("npo", scores, batch)
    forget = -2 / beta * jax.nn.log_sigmoid(-beta * logratios)
    retain = -retain_coef * token_average(scores.logps, batch.loss_mask)
    metrics = describe(scores, batch, beta * logratios, beta * logratios)
    return masked_mean(jnp.where(keep > 0, retain, forget), counted), metrics


def gradient_difference(scores: Scores, batch: Batch, *, retain_coef: float = 1.0) -> tuple[Mean, Metrics]:
    """Return the log-likelihood of the rows to forget, c times the NLL of the rows to keep, each per token, a mean over rows.

    Gradient ascent on one set and descent on the other: Liu, Liu and Stone, 2022, arXiv 2203.12817. It has no lower bound: stop early, or
    use `npo`. Arguments are those of `npo`; it needs no reference.

    Raises:
      ValueError: `desirable` is missing.
    """
    if batch.desirable is None:
        raise ValueError("gradient_difference: batch.desirable is missing: 0 for a row to forget, 1 for one to keep.")
    logps, keep = scores.logps, batch.desirable.astype(batch.loss_mask.dtype)
    average = token_average(logps, batch.loss_mask)
    counted = (jnp.sum(batch.loss_mask, axis=-1) > 0).astype(average.dtype)
    metrics = {
        "nll/keep": masked_mean(-logps, batch.loss_mask * keep[:, None]),
        "nll/forget": masked_mean(-logps, batch.loss_mask * (1 - keep)[:, None]),
    }
    return masked_mean(jnp.where(keep > 0, -retain_coef * average, average), counted), jax.tree.map(jax.lax.stop_gradient, metrics)
