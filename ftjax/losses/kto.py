"""KTO: learning from single responses that are good or bad, each against what the policy gives to any response.

The baseline z is the mean log-ratio of *mismatched* prompts and responses over the whole step. A loss sees one micro-batch, and σ(x - z)
is not linear in z; so z is an input of the loss, found by a forward pass before the first gradient, as the reference is:

    z = kl_baseline(score(model, params, batch.mismatched), batch.mismatched)     # a Mean: micro-batches and devices add
    batch = with_baseline(batch, z)

This costs what TRL pays too (it scores the mismatched rows beside each micro-batch), and every micro-batch and device then subtracts the
same number.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.diagnosis import SATURATED, distance
from ftjax.losses.options import check_beta
from ftjax.losses.packing import for_every_row
from ftjax.losses.reference import reference_logps
from ftjax.losses.responses import token_sum
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def kto(
    scores: Scores, batch: Batch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> tuple[Mean, Metrics]:
    """Return w_D [1 - σ(β(x - z))] for a desirable and w_U [1 - σ(β(z - x))] for an undesirable response, a mean over responses.

    x = log π(y) - log π_ref(y), z = max(0, baseline), without a gradient. Ethayarajh et al., 2024, arXiv 2402.01306: λ_y - v(x, y),
    where λ_D and λ_U are the weights.

    Args:
      scores: of the policy, `[b, t]`.
      batch: with `reference_logps`, `desirable` and `baseline`; a row without tokens counts nowhere.
      beta: > 0, the scale of a log-ratio.
      desirable_weight: w_D. With n_D desirable and n_U undesirable responses w_D n_D / (w_U n_U) should lie in [1, 4/3]: see `balance`.
      undesirable_weight: w_U.

    Returns:
      The loss, and the metrics of both classes, `rewards/{desirable,undesirable}` (β x), `logratio/…` (x), `logps/…` and `length/…` in
      tokens; `rewards/square`: the mean of (β x)²; `accuracy`: the share of responses on their side of the baseline; `saturated`: of those
      whose β|x - z| leaves a gradient below 4 % of the largest; `baseline`: z; `kl`: see `diagnosis.distance`; `nll` of the desirable
      responses.

    Raises:
      ValueError: reference, labels or baseline are missing, or β is not above 0.

    Example:
      >>> row = jnp.zeros((2, 3))
      >>> batch = Batch(row.astype(int), row + 1, row.astype(int), row.astype(int) + 1, reference_logps=row, desirable=jnp.array([1, 0]))
      >>> loss, _ = kto(Scores(logps=row), with_baseline(batch, Mean(jnp.zeros(()), jnp.ones(()))))
      >>> loss.value()
      0.5
    """
    check_beta("kto", beta)
    if batch.baseline is None:
        raise ValueError(
            "kto: batch.baseline is missing: losses.with_baseline(batch, kl_baseline(scores of batch.mismatched, …)) writes it."
        )
    baseline = jax.lax.stop_gradient(jnp.maximum(batch.baseline, 0))
    logratios, desirable, counted = read("kto", scores, batch)
    toward = jnp.where(desirable > 0, 1.0, -1.0).astype(logratios.dtype)
    weights = jnp.where(desirable > 0, desirable_weight, undesirable_weight)
    values = beta * (logratios - baseline)
    metrics = describe(scores, batch, beta * logratios, values) | {"baseline": masked_mean(baseline, counted)}
    return masked_mean(weights * jax.nn.sigmoid(-toward * values), counted), metrics


def apo_zero_unpaired(scores: Scores, batch: Batch, *, beta: float = 0.1) -> tuple[Mean, Metrics]:
    """Return 1 - σ(βx) for a desirable and σ(βx) for an undesirable response: `kto` with the baseline 0.

    The unpaired form of APO-zero, D'Oosterlinck et al., 2024, arXiv 2408.06266, equation 7. Arguments and metrics are those of `kto`.
    """
    check_beta("apo_zero_unpaired", beta)
    loss, metrics = kto(scores, dataclasses.replace(batch, baseline=jnp.zeros(batch.loss_mask.shape[0], batch.loss_mask.dtype)), beta=beta)
    return loss, {name: value for name, value in metrics.items() if name != "baseline"}


def kl_baseline(scores: Scores, mismatched: Batch) -> Mean:
    """Return the mean of log π(y) - log π_ref(y) over mismatched rows, of which KTO takes what is above 0.

    Args:
      scores: of the policy as it is before the step.
      mismatched: `batch.mismatched`, with its `reference_logps`.
    """
    reference = reference_logps("kl_baseline", mismatched)
    logratios = token_sum(scores.logps - reference, mismatched.loss_mask)
    return jax.lax.stop_gradient(masked_mean(logratios, has_tokens(mismatched)))


def with_baseline(batch: Batch, *means: Mean) -> Batch:
    """Return `batch` with a quotient as the baseline of every row, or packed item: the average of several; 0 where nothing was counted."""
    return dataclasses.replace(batch, baseline=sum(for_every_row(batch, mean) for mean in means) / len(means))


def balance(num_desirable: int, num_undesirable: int, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str | None:
    """Say what is wrong with the weights of the two classes in a data set, or None: w_D n_D / (w_U n_U) should lie in [1, 4/3]."""
    if not num_desirable or not num_undesirable:
        return f"kto: {num_desirable} desirable and {num_undesirable} undesirable responses: it needs both."
    ratio = desirable_weight * num_desirable / (undesirable_weight * num_undesirable)
    if 0.99 <= ratio <= 1.34:
        return None
    low, high = (share * undesirable_weight * num_undesirable / num_desirable for share in (1, 4 / 3))
    return (
        f"kto: desirable responses weigh {ratio:.2f} times what undesirable ones do, and 1 to 1.33 is advised: "
        f"choose desirable_weight between {low:.3g} and {high:.3g}."
    )


def has_tokens(batch: Batch) -> Float[Array, " b"]:
    """Return 1 for the rows that have tokens and 0 for those that only fill the batch."""
    return (jnp.sum(batch.loss_mask, axis=-1) > 0).astype(batch.loss_mask.dtype)


def read(name: str, scores: Scores, batch: Batch) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """Return log-ratios, labels and which rows count; `name` is the loss that asks.

    Raises:
      ValueError: reference or labels are missing, or the rows are pairs.
    """
    reference = reference_logps(name, batch)
    if batch.desirable is None or scores.logps.ndim != 2:
        raise ValueError(
            f"{name}: expected batch.desirable [b] and log-probabilities [b, t], got {batch.desirable} and {scores.logps.shape}."
        )
    return token_sum(scores.logps - reference, batch.loss_mask), batch.desirable.astype(batch.loss_mask.dtype), has_tokens(batch)


def describe(scores: Scores, batch: Batch, rewards: Float[Array, " b"], values: Float[Array, " b"]) -> Metrics:
    """Return the metrics that losses of single responses share; `values` are the rewards above the baseline."""
    desirable, counted = batch.desirable.astype(batch.loss_mask.dtype), has_tokens(batch)
    found = {
        "rewards": rewards,
        "logratio": token_sum(scores.logps - batch.reference_logps, batch.loss_mask),
        "logps": token_sum(scores.logps, batch.loss_mask),
        "length": jnp.sum(batch.loss_mask, axis=-1),
    }
    metrics = {
        "accuracy": masked_mean((jnp.sign(values) * (2 * desirable - 1) + 1) / 2, counted),
        "saturated": masked_mean((jnp.abs(values) > SATURATED).astype(values.dtype), counted),
        "rewards/square": masked_mean(jnp.square(rewards), counted),
        "kl": distance(scores, batch),
        "nll": masked_mean(-scores.logps, batch.loss_mask * desirable[:, None]),
    }
    for side, share in (("desirable", desirable), ("undesirable", 1 - desirable)):
        metrics |= {f"{name}/{side}": masked_mean(value, counted * share) for name, value in found.items()}
    if scores.entropy is not None:
        metrics["entropy"] = masked_mean(scores.entropy, batch.loss_mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)
