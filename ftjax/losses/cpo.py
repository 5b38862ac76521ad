"""Losses of pairs without a reference: CPO, SimPO and AlphaPO read log-probabilities where DPO reads log-ratios."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ftjax.losses.diagnosis import diagnose, gradient_share
from ftjax.losses.divergences import capped_expm1
from ftjax.losses.options import check_beta
from ftjax.losses.pairs import cross_entropy
from ftjax.losses.preference import make_pairs, preference
from ftjax.losses.responses import token_average
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def cpo(
    scores: Scores,
    batch: Batch,
    *,
    losses: Mapping[str, float] = {"sigmoid": 1.0},
    beta: float = 0.1,
    label_smoothing: float | None = None,
    nll_coef: float = 1.0,
    nll_per_token: bool = True,
) -> tuple[Mean, Metrics]:
    """Return -log σ( β [log π(y_c) - log π(y_r)] ) + c · NLL(y_c), a mean over pairs: `preference` with a uniform reference.

    Xu et al., 2024, arXiv 2401.08417, equation 3 and the behaviour cloning term beside it. The paper writes the NLL as a sum over the
    response, which `nll_per_token=False` has; by itself it is per token here, as in all losses of ftjax, so that c means the same at every
    length (TRL: over the tokens of a micro-batch, which changes with the split). Other `losses` are those of `PAIR_LOSSES` with
    x = log π(y): `hinge` is SLiC's, `ipo` is length-averaged.

    Args:
      scores: of the policy, `[b, 2, t]`, chosen first.
      batch: a pair in which a response has no token counts nowhere; its reference is not read.
      losses: names in `PAIR_LOSSES` and their weights.
      beta: > 0, the scale of a log-probability.
      label_smoothing: the probability that a label is wrong.
      nll_coef: weight of the negative log-likelihood of the chosen response.
      nll_per_token: whether that is divided by the response's length.

    Returns:
      The loss and the metrics of `preference`, without those of a reference, `kl` and `logratio/…`.

    Raises:
      ValueError: as in `preference`.
    """
    uniform = dataclasses.replace(batch, reference_logps=jnp.zeros_like(scores.logps))
    options = {"label_smoothing": label_smoothing, "nll_coef": nll_coef, "nll_per_token": nll_per_token}
    loss, metrics = preference(scores, uniform, losses=losses, beta=beta, **options)
    return loss, {name: value for name, value in metrics.items() if name != "kl" and not name.startswith("logratio/")}


def simpo(
    scores: Scores,
    batch: Batch,
    *,
    beta: float = 2.0,
    margin: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> tuple[Mean, Metrics]:
    """Return -log σ( r(y_c) - r(y_r) - γ ), a mean over pairs, where r(y) = β mean_t log π(y_t).

    SimPO: Meng, Xia and Chen, 2024, arXiv 2405.14734, equation 6; its γ is our `margin` (TRL's defaults are β 0.1 and γ 0.5, far from the
    paper's). With α ≠ 0 it is AlphaPO, Gupta et al., 2025, arXiv 2501.03884: r(y) = β (1 - p^-α) / α with log p = mean_t log π(y_t), which
    is SimPO at α → 0. Label smoothing and the NLL per token are CPO's.

    Args:
      scores: of the policy, `[b, 2, t]`, chosen first.
      batch: a pair in which a response has no token counts nowhere.
      beta: > 0, the scale of the reward.
      margin: γ ≥ 0: by how much the chosen response is to be better.
      alpha: α: above 0 unlikely responses are punished more than their log-probability says, below 0 less.
      label_smoothing: the probability that a label is wrong.
      nll_coef: weight of the negative log-likelihood per token of the chosen response.

    Returns:
      The loss and the metrics of `diagnosis.diagnose`, with `nll/share`, the NLL's part of the gradient, where it has a coefficient.

    Raises:
      ValueError: β is not above 0, or the rows are no pairs.

    Example:
      >>> pair = jnp.zeros((1, 2, 3))
      >>> batch = Batch(pair.astype(int), pair + 1, pair.astype(int), pair.astype(int) + 1)
      >>> loss, _ = simpo(Scores(logps=pair - 1), batch, margin=0.0)
      >>> round(loss.value(), 4)
      0.6931
    """
    check_beta("simpo", beta)
    counted = make_pairs(scores.logps, jnp.zeros_like(scores.logps), batch.loss_mask).counted
    average = token_average(scores.logps, batch.loss_mask)

    def pair_loss(average: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen, rejected = rewards = beta * _alpha_reward(average, alpha).T
        return cross_entropy(chosen - rejected - margin, label_smoothing), rewards

    loss, rewards = pair_loss(average)
    metrics = diagnose(scores, batch, *rewards, counted)
    if nll_coef:
        pull = jax.grad(lambda average: jnp.sum(pair_loss(average)[0]))(average)[:, 0]
        metrics["nll/share"] = gradient_share(jnp.full_like(pull, nll_coef), jnp.abs(pull), counted)
    return masked_mean(loss - nll_coef * average[:, 0], counted), metrics


def _alpha_reward(logp: jax.Array, alpha: float) -> jax.Array:
    """Return (1 - p^-α) / α, log p at α = 0; where p^-α would overflow it goes on as a tangent."""
    return logp if alpha == 0 else -capped_expm1(-alpha * logp) / alpha
