"""What a sample was worth beside its siblings: the estimators of `losses.advantages` under one signature, for configs to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import advantages, shaping
from ftjax.types import pytree


@pytree
class Evidence:
    """What is known of an experience of p prompts with g samples each."""

    rewards: jax.Array
    """float `[p, g]`."""
    counted: jax.Array
    """float `[p, g]`: 1 where there is a reward."""
    mask: jax.Array
    """float `[p, g, t]`: 1 on the tokens that the policy wrote."""
    kl: jax.Array
    """float `[p, g, t]`: the log-ratio of the policy to its reference; 0 without one."""
    kl_coef: jax.Array | float = 0.0
    """What of it is taken from the rewards."""
    greedy: jax.Array | None = None
    """float `[p]`: what the most likely answer to each prompt is worth."""
    values: jax.Array | None = None
    """float `[p, g, t]`: `Scores.values` of the policy that sampled."""
    opponents: jax.Array | None = None
    """float `[p, g]`: what the opponent's sample is worth that each is compared with; where there is none, `counted` is 0."""
    each: jax.Array | None = None
    """float `[k, p, g]`: each of k rewards by itself; NaN where it does not apply."""
    weights: jax.Array | None = None
    """float `[k]`: theirs."""

    @property
    def whole(self) -> jax.Array:
        """Float `[p, g]`: rewards less the divergence of all tokens."""
        return shaping.response_rewards(self.rewards, self.kl, self.mask, kl_coef=self.kl_coef)

    @property
    def by_token(self) -> jax.Array:
        """Float `[p, g, t]`: the divergence of each token, and at the last one the reward."""
        rewards = jnp.where(self.counted > 0, self.rewards, 0)
        return shaping.token_rewards(rewards, self.kl, self.mask, kl_coef=self.kl_coef)


Worth = Mapping[str, jax.Array]
"""Fields of `Batch`: `advantages` `[p, g]` or `[p, g, t]`, perhaps `returns` and what `loss_mask` is left `[p, g, t]`."""


class Estimator(NamedTuple):
    """A name of `ESTIMATORS` stands for one."""

    estimate: Callable[..., Worth]
    """`(Evidence, **options) -> Worth`."""
    least: int = 1
    """Samples of a prompt that it needs."""
    greedy: bool = False
    """Whether it needs the most likely answer of each prompt."""
    values: bool = False
    """Whether it needs values."""
    opponents: bool = False
    """Whether it needs opponents."""
    options: tuple[str, ...] = ()
    """That it takes, by the names of `config.rollout`."""


def group_relative(evidence: Evidence, *, scale: str = "group") -> Worth:
    """GRPO's; Dr. GRPO's without a scale."""
    return {"advantages": advantages.group_relative(evidence.whole, evidence.counted, scale=scale)}


def leave_one_out(evidence: Evidence) -> Worth:
    """RLOO's."""
    return {"advantages": advantages.leave_one_out(evidence.whole, evidence.counted)}


def leave_one_out_scaled(evidence: Evidence) -> Worth:
    """NeMo RL's GRPO."""
    return {"advantages": advantages.leave_one_out_scaled(evidence.whole, evidence.counted)}


def optimal_baseline(evidence: Evidence) -> Worth:
    """OPO's."""
    return {"advantages": advantages.optimal_baseline(evidence.whole, jnp.sum(evidence.mask, axis=-1), evidence.counted)}


def greedy_baseline(evidence: Evidence) -> Worth:
    """ReMax's, of each token what is to come; the divergence of the greedy answer is not part of its worth."""
    mask = evidence.mask * evidence.counted[..., None]
    return {"advantages": advantages.greedy_baseline(advantages.to_come(evidence.by_token, mask), evidence.greedy, mask)}


def reinforce_plus_plus(evidence: Evidence, *, gamma: float = 1.0) -> Worth:
    """REINFORCE++'s."""
    mask = evidence.mask * evidence.counted[..., None]
    return {"advantages": advantages.reinforce_plus_plus(evidence.by_token, mask, gamma=gamma)}


def reinforce_plus_plus_baseline(evidence: Evidence) -> Worth:
    """REINFORCE++'s with the mean of a group as its baseline."""
    return {"advantages": advantages.reinforce_plus_plus_baseline(evidence.whole, evidence.mask, evidence.counted)}


def gae(evidence: Evidence, *, gamma: float = 1.0, lam: float = 0.95, whiten_rewards: bool = False) -> Worth:
    """PPO's, whitened; of a sample without a reward, which has neither advantage nor return, no token counts.

    With `whiten_rewards` what tokens are paid is brought to the deviation 1 before, its mean kept, as TRL's option of the name does.
    """
    mask = evidence.mask * evidence.counted[..., None]
    rewards = advantages.whiten(evidence.by_token, mask, shift_mean=False) if whiten_rewards else evidence.by_token
    found, returns = advantages.gae(rewards, shaping.state_values(evidence.values), mask, gamma=gamma, lam=lam)
    return {"advantages": advantages.whiten(found, mask), "returns": returns, "loss_mask": mask}


def plain(evidence: Evidence) -> Worth:
    """REINFORCE's without a baseline."""
    return {"advantages": jnp.where(evidence.counted > 0, evidence.whole, 0)}


def preferred(evidence: Evidence) -> Worth:
    """Nash-MD's."""
    return {"advantages": advantages.preferred(evidence.rewards, evidence.opponents, evidence.counted)}


def decoupled(evidence: Evidence) -> Worth:
    """GDPO's: each reward is standardised by itself, and so nothing that acts on their sum is heeded."""
    counted = jnp.isfinite(evidence.each).astype(jnp.float32) * evidence.counted[None]
    return {"advantages": advantages.decoupled(evidence.each, evidence.weights, counted)}


ESTIMATORS: Mapping[str, Estimator] = {
    "group_relative": Estimator(group_relative, least=2),
    "group_centred": Estimator(partial(group_relative, scale="none"), least=2),
    "batch_scaled": Estimator(partial(group_relative, scale="batch"), least=2),
    "leave_one_out": Estimator(leave_one_out, least=2),
    "leave_one_out_scaled": Estimator(leave_one_out_scaled, least=2),
    "optimal_baseline": Estimator(optimal_baseline, least=2),
    "greedy_baseline": Estimator(greedy_baseline, greedy=True),
    "reinforce_plus_plus": Estimator(reinforce_plus_plus, options=("gamma",)),
    "reinforce_plus_plus_baseline": Estimator(reinforce_plus_plus_baseline, least=2),
    "gae": Estimator(gae, values=True, options=("gamma", "lam", "whiten_rewards")),
    "rewards": Estimator(plain),
    "decoupled": Estimator(decoupled, least=2),
    "preferred": Estimator(preferred, opponents=True),
}
