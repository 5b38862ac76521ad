"""BCO: a binary classifier of single responses whose logit is their reward above the mean reward δ.

δ is a mean over all responses seen so far. The loss has no memory: it returns the Mean `rewards`, the caller adds it to what was before,
and `with_baseline` writes the quotient into the next batch. So δ lags one step behind; at the first it is 0, which is exact, as policy and
reference are equal. TRL 1.13 counted the micro-batch at hand too; there is no option for that, as it makes the loss depend on the split.

    loss, metrics = bco(scores, with_baseline(batch, seen)); seen = seen + metrics["rewards"]

The paper's δ is the average of what the two classes get, which is another number where one has more responses than the other. It is a
`with_baseline` of two means, `rewards/desirable` and `rewards/undesirable`, and as an objective it is called `bco_balanced`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.losses.kto import describe, read
from ftjax.losses.options import check_beta
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def bco(
    scores: Scores, batch: Batch, *, beta: float = 0.1, min_density_ratio: float = 0.5, max_density_ratio: float = 10.0
) -> tuple[Mean, Metrics]:
    """Return -log σ(βx - δ) for a desirable and -log σ(-(βx - δ)) for an undesirable response, a mean over responses.

    x = log π(y) - log π_ref(y). Jung et al., 2024, arXiv 2404.04656.

    Args:
      scores: of the policy, `[b, t]`.
      batch: with `reference_logps`, `desirable` and `baseline` (δ); with `density_ratios`, undesirable responses are weighed by them.
      beta: > 0, the scale of a log-ratio.
      min_density_ratio: below it a ratio counts as this: it comes from a classifier, which may be sure of itself.
      max_density_ratio: above it likewise.

    Returns:
      The loss, and the metrics of `kto` with `rewards` of all responses, which the caller sums, and `delta`.

    Raises:
      ValueError: reference, labels or baseline are missing, or β is not above 0.
    """
    check_beta("bco", beta)
    if batch.baseline is None:
        raise ValueError("bco: batch.baseline is missing: losses.with_baseline(batch, the rewards seen so far) writes it.")
    delta = jax.lax.stop_gradient(batch.baseline)
    logratios, desirable, counted = read("bco", scores, batch)
    rewards = beta * logratios
    toward = jnp.where(desirable > 0, 1.0, -1.0).astype(rewards.dtype)
    losses = -jax.nn.log_sigmoid(toward * (rewards - delta))
    if batch.density_ratios is not None:
        losses = losses * jnp.where(desirable > 0, 1, jnp.clip(batch.density_ratios, min_density_ratio, max_density_ratio))
    metrics = describe(scores, batch, rewards, rewards - delta)
    metrics |= {"rewards": jax.lax.stop_gradient(masked_mean(rewards, counted)), "delta": masked_mean(delta, counted)}
    return masked_mean(losses, counted), metrics
