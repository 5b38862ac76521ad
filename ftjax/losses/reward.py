"""Reward models: the scalar that a value head reads off a whole response, trained to rank pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.diagnosis import SATURATED
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def bradley_terry(scores: Scores, batch: Batch, *, centering_coef: float = 0.0) -> tuple[Mean, Metrics]:
    """Return -log σ( r(y_c) - r(y_r) - m ) + c (r(y_c) + r(y_r))², a mean over pairs.

    r is the value at the last token that is not padding. Pairs: Ouyang et al., 2022, arXiv 2203.02155, equation 1; the margin m: Touvron
    et al., 2023, arXiv 2307.09288, equation 2; centring: Eisenstein et al., 2023, arXiv 2312.09244. OpenRLHF's `logexp`,
    log(1 + e^(r_r - r_c)), is this loss without a margin.

    Args:
      scores: with `values` `[b, 2, t]`, chosen first.
      batch: its `segment_ids` say where a response ends; `margins` are used where they are given.
      centering_coef: c ≥ 0: rewards are known up to a constant, which this fixes; it shrinks their spread a little too. 0.01 is usual.

    Returns:
      The loss, and the metrics `rewards/{chosen,rejected,margin,accuracy}`; `rewards/square` and `rewards/margin_square`: the means of r²
      and of the margin's square, which with the means give their spread; `saturated`: the share of pairs whose margin is further from m
      than `diagnosis.SATURATED`.

    Raises:
      ValueError: values were not scored, or the rows are no pairs.

    Example:
      >>> pair = jnp.zeros((1, 2, 3))
      >>> batch = Batch(pair.astype(int), pair, pair.astype(int), pair.astype(int) + 1)
      >>> loss, metrics = bradley_terry(Scores(logps=pair, values=jnp.array([[[9.0, 9.0, 1.0], [9.0, 9.0, 0.0]]])), batch)
      >>> round(loss.value(), 4), metrics["rewards/accuracy"].value()
      (0.3133, 1.0)
    """
    rewards = response_rewards(scores, batch)
    if rewards.ndim != 2 or rewards.shape[1] != 2:
        raise ValueError(f"bradley_terry: expected values [b, 2, t], chosen first, got {scores.values.shape}.")
    counted = jnp.all(jnp.any(batch.segment_ids > 0, axis=-1), axis=-1).astype(rewards.dtype)
    chosen, rejected = rewards.T
    margin = chosen - rejected
    target = 0 if batch.margins is None else batch.margins
    loss = -jax.nn.log_sigmoid(margin - target) + centering_coef * jnp.square(chosen + rejected)
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/accuracy": (jnp.sign(margin) + 1) / 2,
        "rewards/square": (jnp.square(chosen) + jnp.square(rejected)) / 2,
        "rewards/margin_square": jnp.square(margin),
        "saturated": (jnp.abs(margin - target) > SATURATED).astype(margin.dtype),
    }
    return masked_mean(loss, counted), {name: jax.lax.stop_gradient(masked_mean(value, counted)) for name, value in found.items()}


def stepwise(scores: Scores, batch: Batch) -> tuple[Mean, Metrics]:
    """Return -y log σ(v) - (1 - y) log σ(-v), a mean over steps: a process reward model.

    v is the value at the last token of a step and y says whether the step is right: Lightman et al., 2023, arXiv 2305.20050. TRL 1.13
    trains two logits, whose difference is v.

    Args:
      scores: with `values` `[*b, t]`.
      batch: `loss_mask` is 1 at the last token of each step, and `labels` is y there, in [0, 1].

    Returns:
      The loss, and the metrics `accuracy` (v on the right side of 0), `accuracy/wrong`: of the steps with y < ½ alone, which are the few,
      and `labels`: the share of right ones.

    Raises:
      ValueError: values were not scored, or there are no labels.
    """
    if scores.values is None or batch.labels is None:
        raise ValueError("stepwise: it needs scores.values (score with outputs=('logps', 'values') and a value head) and batch.labels.")
    values, labels, mask = scores.values, batch.labels, batch.loss_mask
    loss = -labels * jax.nn.log_sigmoid(values) - (1 - labels) * jax.nn.log_sigmoid(-values)
    right = ((values > 0) == (labels > 0.5)).astype(values.dtype)
    wrong_steps = mask * (labels < 0.5).astype(mask.dtype)
    return masked_mean(loss, mask), {
        "accuracy": masked_mean(right, mask),
        "accuracy/wrong": masked_mean(right, wrong_steps),
        "labels": masked_mean(labels, mask),
    }


def response_rewards(scores: Scores, batch: Batch) -> Float[Array, "*b"]:
    """Return the value at the last token that is not padding; 0 for a row of padding alone."""
    if scores.values is None:
        raise ValueError("reward: values were not scored: score with outputs=('logps', 'values') and add peft.value_head() to the method.")
    real = batch.segment_ids > 0
    last = jnp.max(jnp.where(real, jnp.arange(real.shape[-1]).reshape((1,) * (real.ndim - 1) + (-1,)), 0), axis=-1)
    found = jnp.take_along_axis(scores.values, last[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.any(real, axis=-1), found, 0)
