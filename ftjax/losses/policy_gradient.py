"""Learning from rollouts: GRPO and its family, which differ in the ratio, in what clips it, and in how tokens are averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.correction import CORRECTIONS, off_policy_mask
from ftjax.losses.entropy import top_entropy
from ftjax.losses.kl import KL_ESTIMATORS, k3
from ftjax.losses.reductions import REDUCTIONS
from ftjax.losses.reference import reference_logps
from ftjax.losses.surrogates import LEVELS, SURROGATES, Actions, Clips
from ftjax.tree import nearest
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def policy_gradient(
    scores: Scores,
    batch: Batch,
    *,
    surrogate: str = "clipped",
    level: str = "token",
    reduction: str = "sequence_mean",
    clip_low: float | None = None,
    clip_high: float | None = None,
    ratio_cap: float | None = None,
    tau_positive: float | None = None,
    tau_negative: float | None = None,
    max_tokens: float | None = None,
    kl: str = "k3",
    kl_coef: float = 0.0,
    kl_weighted: bool = True,
    entropy_coef: float = 0.0,
    entropy_share: float = 1.0,
    correction: str | None = None,
    correction_cap: float = 3.0,
    correction_floor: float = 0.0,
    off_policy_threshold: float | None = None,
) -> tuple[Mean, Metrics]:
    """Return Σ over tokens of w ℓ(ρ, A) + β ρ KL - c H, reduced as `reduction` says.

    ρ = π / π_old, with π_old the policy before its first step on these rollouts; without `batch.old_logps`, or where they are NaN, it is
    the policy itself, and ρ is exactly 1 with the gradient ∇log π. GRPO: Shao et al., 2024, arXiv 2402.03300, equation 3. `LOSSES` lists
    the family.

    Args:
      scores: of the policy, `[b, t]`.
      batch: with `advantages` `[b]` or `[b, t]`; `old_logps` after the first step; `reference_logps` for the KL divergence.
      surrogate: ℓ, a name in `surrogates.SURROGATES`.
      level: of which log-ratio ρ is made, a name in `surrogates.LEVELS`.
      reduction: a name in `reductions.REDUCTIONS`.
      clip_low: of the surrogate, whose default holds if it is None; so with the next four.
      clip_high: likewise.
      ratio_cap: δ of `clipped`.
      tau_positive: of `sapo`.
      tau_negative: of `sapo`.
      max_tokens: of `constant_length`.
      kl: a name in `kl.KL_ESTIMATORS`.
      kl_coef: β ≥ 0, of the KL divergence from the reference; above 0 the objective reads `reference_logps`.
      kl_weighted: whether the divergence is multiplied by ρ, which makes its gradient right: see `losses.kl`.
      entropy_coef: c, of the entropy, which needs `score(…, entropy_gradient=True)`. It is reduced as the rest is (TRL 1.16: over tokens).
      entropy_share: the share of each response's tokens, those of the highest entropy, that have a surrogate: see `entropy.top_entropy`.
      correction: a name in `correction.CORRECTIONS`: w from `old_logps` and `behavior_logps`; 1 if None.
      correction_cap: the largest w; `inf` for none.
      correction_floor: the least w, 0 for none; IcePop of verl and NeMo RL is "token_mask" with both.
      off_policy_threshold: by how much, in nats a token, the policy may have left a bad response that still counts: see
        `correction.off_policy_mask`; by any if None.

    Returns:
      The loss and the metrics of `diagnose_actions`.

    Raises:
      ValueError: something is missing from scores or batch, an unknown name, or an option that the chosen functions do not take.

    Example:
      >>> row = jnp.zeros((2, 3))
      >>> batch = Batch(row.astype(int), row + 1, row.astype(int), row.astype(int) + 1, advantages=jnp.array([1.0, -3.0]))
      >>> loss, metrics = policy_gradient(Scores(logps=row - 1), batch)
      >>> loss.value(), metrics["ratio"].value()
      (1.0, 1.0)
    """
    options = {"clip_low": clip_low, "clip_high": clip_high, "ratio_cap": ratio_cap, "max_tokens": max_tokens}
    options |= {"tau_positive": tau_positive, "tau_negative": tau_negative}
    surrogate_of, reduce = with_options(
        {"surrogate": _chosen("surrogate", surrogate, SURROGATES), "reduction": _chosen("reduction", reduction, REDUCTIONS)}, options
    )
    estimate, mask = _chosen("kl", kl, KL_ESTIMATORS), batch.loss_mask
    actions = read_actions("policy_gradient", scores, batch)
    actions = actions._replace(logratio=_chosen("level", level, LEVELS)(actions.logratio, mask))
    losses, clips = surrogate_of(actions)
    if entropy_share < 1:
        losses = losses * top_entropy(needed_entropy(scores), mask, share=entropy_share)
    metrics = diagnose_actions(scores, batch, actions, clips)
    if correction is not None:
        weights, found = importance_weights(scores, batch, correction=correction, cap=correction_cap, floor=correction_floor)
        losses, metrics = losses * weights, metrics | found
    if off_policy_threshold is not None:
        kept = off_policy_mask(actions.logps, behavior(scores, batch), actions.advantages, mask, threshold=off_policy_threshold)
        losses, metrics = losses * kept, metrics | {"behavior/kept": masked_mean(kept, mask)}
    if kl_coef:
        logratio = jnp.where(mask > 0, scores.logps - reference_logps("policy_gradient", batch), 0)
        losses = losses + kl_coef * estimate(logratio) * (actions.ratio if kl_weighted else 1)
    if entropy_coef:
        losses = losses - entropy_coef * needed_entropy(scores)
    return reduce(losses, mask), metrics


def read_actions(name: str, scores: Scores, batch: Batch) -> Actions:
    """Return what surrogates read, with the log-ratio of each token by itself; `name` is the loss that asks.

    Raises:
      ValueError: there are no advantages, or they are not of these rows.
    """
    shape = scores.logps.shape
    if batch.advantages is None or batch.advantages.shape not in (shape, shape[:-1]):
        found = None if batch.advantages is None else batch.advantages.shape
        raise ValueError(f"{name}: expected batch.advantages of the shape {shape[:-1]} or {shape}, got {found}: see losses.advantages.")
    advantages = batch.advantages if batch.advantages.shape == shape else batch.advantages[..., None]
    mask = batch.loss_mask
    counted = lambda x: jnp.where(mask > 0, x, 0)  # noqa: E731
    logps = counted(scores.logps)
    return Actions(logps, counted(logps - old_logps(scores, batch)), counted(jnp.broadcast_to(advantages, shape)), mask)


def old_logps(scores: Scores, batch: Batch) -> Float[Array, "*b t"]:
    """Return what the policy said before its first step on these rollouts, which is what it says at that step."""
    now = jax.lax.stop_gradient(scores.logps)
    return now if batch.old_logps is None else jnp.where(jnp.isnan(batch.old_logps), now, batch.old_logps)


def behavior(scores: Scores, batch: Batch) -> Float[Array, "*b t"]:
    """Return what the sampler said of its tokens, or, where that is not known, what the policy said at the time."""
    return old_logps(scores, batch) if batch.behavior_logps is None else batch.behavior_logps


def importance_weights(scores: Scores, batch: Batch, *, correction: str, cap: float, floor: float) -> tuple[Float[Array, "*b t"], Metrics]:
    """Return w of a correction, and its metrics.

    They are `behavior/logratio`, the mean |log π_old/π_behavior|, `behavior/weight`, and `behavior/weight/{min,max}` of the least and the
    largest w of each response, a mean over responses.
    """
    if not 0 <= floor <= cap:
        raise ValueError(f"policy_gradient: correction_floor is between 0 and correction_cap = {cap}, not {floor}.")
    if batch.behavior_logps is None:
        raise ValueError("policy_gradient: batch.behavior_logps is missing: a correction needs what the sampler said of its tokens.")
    logratio = jnp.where(batch.loss_mask > 0, old_logps(scores, batch) - batch.behavior_logps, 0)
    weights = _chosen("correction", correction, CORRECTIONS)(logratio, cap=cap, floor=floor)
    responses = (jnp.sum(batch.loss_mask, axis=-1) > 0).astype(logratio.dtype)
    counted = lambda rest: jnp.where(batch.loss_mask > 0, weights, rest)  # noqa: E731
    return weights, {
        "behavior/logratio": masked_mean(jnp.abs(logratio), batch.loss_mask),
        "behavior/weight": masked_mean(weights, batch.loss_mask),
        "behavior/weight/min": masked_mean(jnp.min(counted(jnp.inf), axis=-1), responses),
        "behavior/weight/max": masked_mean(jnp.max(counted(0), axis=-1), responses),
    }


def diagnose_actions(scores: Scores, batch: Batch, actions: Actions, clips: Clips) -> Metrics:
    """Return the metrics of rollouts, means over tokens unless it says otherwise.

    Returns:
      `ratio`, and `ratio/{min,max}`: of the least and the largest ratio of each response, a mean over responses; `clip/{low,high,cap}`: the
      share of tokens that were clipped there; `kl/old`: k3 of the policy from π_old; `kl`: of the policy from the reference, where there
      is one; `entropy` where scored.
    """
    mask, ratio = batch.loss_mask, actions.ratio
    responses = (jnp.sum(mask, axis=-1) > 0).astype(mask.dtype)
    metrics = {
        "ratio": masked_mean(ratio, mask),
        "ratio/min": masked_mean(jnp.min(jnp.where(mask > 0, ratio, jnp.inf), axis=-1), responses),
        "ratio/max": masked_mean(jnp.max(jnp.where(mask > 0, ratio, 0), axis=-1), responses),
        "kl/old": masked_mean(ratio - 1 - actions.logratio, mask),
    }
    metrics |= {f"clip/{name}": masked_mean(where.astype(mask.dtype), mask) for name, where in clips.items()}
    if batch.reference_logps is not None:
        metrics["kl"] = masked_mean(k3(jnp.where(mask > 0, scores.logps - batch.reference_logps, 0)), mask)
    if scores.entropy is not None:
        metrics["entropy"] = masked_mean(scores.entropy, mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)


def needed_entropy(scores: Scores) -> Float[Array, "*b t"]:
    """Return the entropy, or say how to get it."""
    if scores.entropy is None:
        raise ValueError("policy_gradient: entropy was not scored: score with outputs=('logps', 'entropy').")
    return scores.entropy


def with_options(functions: Mapping[str, Callable], options: Mapping[str, Any]) -> list[Callable]:
    """Return each function with the options that it takes, of those that are not None.

    Raises:
      ValueError: an option that none of them takes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    takes = {name: inspect.signature(function).parameters.keys() & given.keys() for name, function in functions.items()}
    if unknown := sorted(given.keys() - set().union(*takes.values())):
        names = " nor ".join(f"the {kind} {function.__name__!r}" for kind, function in functions.items())
        raise ValueError(f"policy_gradient: neither {names} takes {unknown[0]}.")
    return [partial(function, **{option: given[option] for option in takes[name]}) for name, function in functions.items()]


def _chosen(kind: str, name: str, among: Mapping[str, Callable]) -> Callable:
    if name not in among:
        raise ValueError(f"policy_gradient: there is no {kind} {name!r}; nearest: {nearest(name, among)}.")
    return among[name]


grpo = partial(policy_gradient, surrogate="clipped", reduction="sequence_mean")
gspo = partial(grpo, level="sequence", clip_low=3e-4, clip_high=4e-4)
reinforce = partial(policy_gradient, surrogate="unclipped", reduction="sequence_sum")
POLICY_LOSSES: dict[str, Callable[..., tuple[Mean, Metrics]]] = {
    "reinforce": reinforce,
    "remax": reinforce,
    "opo": reinforce,
    "reinforce_plus_plus": partial(grpo, reduction="token_mean"),
    "rloo": partial(grpo, level="response"),
    "grpo": grpo,
    "bnpo": partial(grpo, reduction="token_mean"),
    "dr_grpo": partial(grpo, reduction="constant_length"),
    "dapo": partial(grpo, reduction="token_mean", clip_high=0.28),
    "cispo": partial(policy_gradient, surrogate="cispo", reduction="token_mean"),
    "gspo": gspo,
    "gspo_token": partial(gspo, level="sequence_token"),
    "luspo": partial(gspo, reduction="sequence_sum"),
    "sapo": partial(policy_gradient, surrogate="sapo", reduction="sequence_mean"),
    "vespo": partial(policy_gradient, surrogate="vespo", level="response", reduction="token_mean"),
    "gmpo": partial(policy_gradient, surrogate="gmpo", reduction="sequence_mean"),
}
"""ReMax, OPO and REINFORCE++ are estimators of advantages first of all: see `losses.advantages`. GSPO's clips are its paper's; LUSPO, 2026,
arXiv 2602.05261, is GSPO with sums: a longer response weighs more."""
