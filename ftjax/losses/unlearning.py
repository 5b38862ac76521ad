"""Unlearning: making a model forget given texts and keep the rest; `desirable` says which rows are to be kept.

Both losses are a mean over the rows to forget and a mean over the rows to keep, so that their coefficients mean the same in every mixture.
A micro-batch does not know how many of each a step has: `with_share(batch, desirable_share(step))` writes it, and micro-batches and devices
add up to the two means. Without it a batch is taken for the whole step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.kto import describe, has_tokens, read
from ftjax.losses.options import check_beta
from ftjax.losses.packing import for_every_row, unpack
from ftjax.losses.responses import token_average
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def npo(scores: Scores, batch: Batch, *, beta: float = 0.1, retain_coef: float = 1.0) -> tuple[Mean, Metrics]:
    """Return the mean of -(2/β) log σ(-βx) over the rows to forget, and c times the mean of the NLL over the rows to keep.

    x = log π(y) - log π_ref(y). Negative preference optimisation, Zhang et al., 2024, arXiv 2404.05868: DPO with a rejected response
    alone. Its gradient is that of gradient ascent, times 2 σ(βx), which goes to 0 as the text is forgotten. Where there is nothing to keep
    it is the paper's basic loss, and else its NPO + RT, but for the NLL, which is per token as in all losses of ftjax.

    Args:
      scores: of the policy, `[b, t]`.
      batch: with `reference_logps` and `desirable`: 0 for a row to forget, 1 for one to keep; `desirable_share` where it is a part of a
        step.
      beta: > 0; towards 0 it becomes gradient ascent.
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
    return _sum_of_means(batch, forget, retain, keep, counted), metrics


def gradient_difference(scores: Scores, batch: Batch, *, retain_coef: float = 1.0) -> tuple[Mean, Metrics]:
    """Return the mean log-likelihood of the rows to forget and c times the mean NLL of the rows to keep, each per token.

    Gradient ascent on one set and descent on the other: Liu, Liu and Stone, 2022, arXiv 2203.12817. It has no lower bound: stop early, or
    use `npo`. Arguments are those of `npo`; it needs no reference.

    Raises:
      ValueError: `desirable` is missing.
    """
    if batch.desirable is None:
        raise ValueError("gradient_difference: batch.desirable is missing: 0 for a row to forget, 1 for one to keep.")
    logps, keep = scores.logps, batch.desirable.astype(batch.loss_mask.dtype)
    average = token_average(logps, batch.loss_mask)
    metrics = {
        "nll/keep": masked_mean(-logps, batch.loss_mask * keep[:, None]),
        "nll/forget": masked_mean(-logps, batch.loss_mask * (1 - keep)[:, None]),
    }
    loss = _sum_of_means(batch, average, -retain_coef * average, keep, has_tokens(batch))
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def desirable_share(batch: Batch) -> Mean:
    """Return the share of the desirable among the responses of a batch that have tokens; of a packed one too."""
    if batch.places is not None:
        _, batch = unpack(Scores(batch.loss_mask), batch)
    return masked_mean(batch.desirable.astype(batch.loss_mask.dtype), has_tokens(batch))


def with_share(batch: Batch, mean: Mean) -> Batch:
    """Return `batch` with the quotient of `desirable_share` over the whole step in every row, or packed item."""
    return dataclasses.replace(batch, desirable_share=for_every_row(batch, mean))


def _sum_of_means(
    batch: Batch, forget: Float[Array, " b"], retain: Float[Array, " b"], keep: Float[Array, " b"], counted: Float[Array, " b"]
) -> Mean:
    """Return mean(forget) + mean(retain), each over its own rows, as a mean over all rows: a row is divided by the share of its kind."""
    kept = (batch if batch.desirable_share is not None else with_share(batch, desirable_share(batch))).desirable_share
    share = jnp.where(keep > 0, kept, 1 - kept)
    return masked_mean(jnp.where(keep > 0, retain, forget) / jnp.where(share > 0, share, 1), counted)
