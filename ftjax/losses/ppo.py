"""PPO: a clipped policy and a clipped value loss, one model with a value head or the scores of two."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.losses.policy_gradient import policy_gradient, with_options
from ftjax.losses.reductions import REDUCTIONS
from ftjax.losses.shaping import state_values
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def ppo(
    scores: Scores,
    batch: Batch,
    *,
    reduction: str = "token_mean",
    max_tokens: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    value_coef: float = 0.1,
    value_clip: float | None = 0.2,
    kl: str = "k3",
    kl_coef: float = 0.0,
    kl_weighted: bool = True,
    entropy_coef: float = 0.0,
    correction: str | None = None,
    correction_cap: float = 3.0,
    correction_floor: float = 0.0,
) -> tuple[Mean, Metrics]:
    """Return -min( ρ A, clip(ρ) A ) + c_v ½ max( (V - R)², (V_old + clip(V - V_old, ±ε_v) - R)² ), by default a mean over tokens.

    Schulman et al., 2017, arXiv 1707.06347, equations 7 and 9. V is the value of the state that a token was drawn in, R its return, both
    from `advantages.gae` with `shaping.token_rewards`, and A is whitened over the batch, by custom. The divergence from the reference is
    in the rewards, by custom, and in the loss where `kl_coef` is not 0.

    These are the losses of TRL 1.12, of verl and of NeMo RL, by value and gradient, with the options that `tests/losses/peers_test.py`
    names. All means are those of the step (TRL: of a micro-batch). TRL also learns the value of the padding after a response that ended
    early. verl clips twice unless told otherwise (`ratio_cap=3.0`), and both it and NeMo RL have the divergence in the loss without its
    ratio (`kl_weighted=False`) and may cut it at 10: see `losses.kl`. NeMo RL's NLL of good responses is not here.

    Args:
      scores: of the policy, with `values`, `[b, t]`.
      batch: with `advantages` and `returns` `[b, t]`, and after the first step on these rollouts `old_logps` and `old_values`.
      reduction: of both terms, a name in `reductions.REDUCTIONS`.
      max_tokens: of `constant_length`.
      clip_low: of the ratio, as in `surrogates.clipped`.
      clip_high: likewise.
      ratio_cap: likewise.
      value_coef: c_v ≥ 0; TRL's 0.1.
      value_clip: ε_v > 0, how far a value may move from what it was at the sampling; not bounded if None.
      kl: as in `policy_gradient`, as the rest.
      kl_coef: β of a KL term in the loss.
      kl_weighted: whether that term is multiplied by the ratio.
      entropy_coef: of the entropy.
      correction: of the sampler's probabilities.
      correction_cap: the largest weight.
      correction_floor: the least weight.

    Returns:
      The loss, and the metrics of `policy_gradient.diagnose_actions`, `loss/policy`, `loss/value` (without its coefficient), `clip/value`:
      the share of values beyond their clip (the three systems: of those whose clipped error is the larger), `values`, `returns`, and
      `value/error` and `returns/square`, the means of (V - R)² and of R², which say what share of the variance is explained.

    Raises:
      ValueError: something is missing from scores or batch.

    Example:
      >>> row = jnp.zeros((1, 3))
      >>> batch = Batch(row.astype(int), row.at[0, 1:].set(1), row.astype(int), row.astype(int) + 1, advantages=row + 1, returns=row + 1)
      >>> loss, metrics = ppo(Scores(row - 1, values=row), batch)
      >>> round(loss.value(), 4), metrics["loss/value"].value()
      (-0.95, 0.5)
    """
    if scores.values is None or batch.returns is None:
        raise ValueError("ppo: it needs scores.values (score with outputs=('logps', 'values') and a value head) and batch.returns [b, t].")
    policy, metrics = policy_gradient(
        scores,
        batch,
        reduction=reduction,
        max_tokens=max_tokens,
        clip_low=clip_low,
        clip_high=clip_high,
        ratio_cap=ratio_cap,
        kl=kl,
        kl_coef=kl_coef,
        kl_weighted=kl_weighted,
        entropy_coef=entropy_coef,
        correction=correction,
        correction_cap=correction_cap,
        correction_floor=correction_floor,
    )
    mask, returns, values = batch.loss_mask, batch.returns, state_values(scores.values)
    old = jax.lax.stop_gradient(values) if batch.old_values is None else state_values(batch.old_values)
    errors = jnp.square(values - returns)
    beyond = jnp.zeros(mask.shape, bool) if value_clip is None else jnp.abs(values - old) > value_clip
    if value_clip is not None:
        errors = jnp.maximum(errors, jnp.square(old + jnp.clip(values - old, -value_clip, value_clip) - returns))
    (reduce,) = with_options({"reduction": REDUCTIONS[reduction]}, {"max_tokens": max_tokens})
    value = reduce(errors / 2, mask)
    said = {"values": values, "returns": returns, "value/error": jnp.square(values - returns), "returns/square": jnp.square(returns)}
    metrics |= {"loss/policy": policy, "loss/value": value, "clip/value": masked_mean(beyond.astype(mask.dtype), mask)}
    metrics |= {name: masked_mean(x, mask) for name, x in said.items()}
    return Mean(policy.total + value_coef * value.total, policy.weight), jax.tree.map(jax.lax.stop_gradient, metrics)
