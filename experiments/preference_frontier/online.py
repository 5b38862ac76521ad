"""Online objectives on the bandit: what a step learns from, drawn from the policy as it is.

What it costs to leave the reference, β log π/π_ref, stands in the reward (REINFORCE, RLOO, PPO) or in the loss (GRPO).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.preference_frontier.bandit import Bandit, batch, score
from ftjax import losses
from ftjax.losses import advantages, shaping
from ftjax.types import Batch, LossFn, Params, Scores

Draw = Callable[[jax.Array], jax.Array]
"""`log π [contexts, arms] -> arms [contexts, g]`."""
Estimate = Callable[[jax.Array, Scores, Batch], dict[str, jax.Array]]
"""`(rewards [contexts, g], scores, batch [contexts, g, 2]) -> fields of the batch`."""


class Online(NamedTuple):
    """One objective, with its β."""

    loss: LossFn
    estimate: Estimate


def objectives(beta: float) -> dict[str, Online]:
    """Return the online objectives at one β."""
    reinforce, rloo, grpo = (losses.POLICY_LOSSES[name] for name in ("reinforce", "rloo", "grpo"))
    as_they_are = of_responses(partial(advantages.group_relative, scale="none"))
    return {
        "REINFORCE": Online(reinforce, of_responses(lambda rewards: rewards, beta)),
        "RLOO": Online(rloo, of_responses(advantages.leave_one_out, beta)),
        "PPO": Online(losses.ppo, of_tokens(beta)),
        "GRPO": Online(partial(grpo, kl_coef=beta), of_responses(advantages.group_relative)),
        "GRPO without scale": Online(partial(grpo, kl_coef=beta), as_they_are),
        "GRPO without scale, k3 alone": Online(partial(grpo, kl_coef=beta, kl_weighted=False), as_they_are),
    }


def of_responses(estimator: Callable[[jax.Array], jax.Array], beta: float = 0.0) -> Estimate:
    """Return what estimates an advantage for each response from the rewards less β log π/π_ref."""

    def estimate(rewards: jax.Array, scores: Scores, batch: Batch) -> dict[str, jax.Array]:
        logratio = scores.logps - batch.reference_logps
        return {"advantages": estimator(shaping.response_rewards(rewards, logratio, batch.loss_mask, kl_coef=beta))}

    return estimate


def of_tokens(beta: float) -> Estimate:
    """Return what estimates advantages and returns for each token, with a critic: PPO's."""

    def estimate(rewards: jax.Array, scores: Scores, batch: Batch) -> dict[str, jax.Array]:
        paid = shaping.token_rewards(rewards, scores.logps - batch.reference_logps, batch.loss_mask, kl_coef=beta)
        found, returns = advantages.gae(paid, shaping.state_values(scores.values), batch.loss_mask)
        return {"advantages": advantages.whiten(found, batch.loss_mask), "returns": returns, "old_values": scores.values}

    return estimate


def rollout(objective: Online, bandit: Bandit, params: Params, draw: Draw) -> Batch:
    """Return arms that the policy draws in every context, with what the objective needs to know of them: a batch `[contexts · g, 2]`."""
    arms = draw(jax.nn.log_softmax(params["policy"]["kernel"]))
    contexts = jnp.broadcast_to(jnp.arange(arms.shape[0])[:, None], arms.shape)
    drawn = batch(bandit, contexts, arms)
    scores, rewards = score(params, drawn), jnp.asarray(bandit.rewards, jnp.float32)[contexts, arms]
    fields = vars(drawn) | {"old_logps": scores.logps} | objective.estimate(rewards, scores, drawn)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), Batch(**fields))
