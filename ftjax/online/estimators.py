"""What a response was worth beside its siblings: the estimators of `losses.advantages` under one signature, for configs to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import advantages
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
    penalties: jax.Array
    """float `[p, g, t]`: taken from the reward of each token: the coefficient times the log-ratio to the reference; 0 without one."""
    greedy: jax.Array | None = None
    """float `[p]`: what the most likely answer to each prompt is worth."""

    @property
    def whole(self) -> jax.Array:
        """Float `[p, g]`: rewards less the penalties of all tokens."""
        return self.rewards - jnp.sum(self.penalties * self.mask, axis=-1)


class Estimator(NamedTuple):
    """A name of `ESTIMATORS` stands for one."""

    estimate: Callable[..., jax.Array]
    """`(Evidence, **options) -> advantages [p, g] or [p, g, t]`."""
    least: int = 1
    """Samples of a prompt that it needs."""
    greedy: bool = False
    """Whether it needs the most likely answer of each prompt."""


def _token_rewards(evidence: Evidence) -> jax.Array:
    """Return the penalties of all tokens, and on the last one the reward, `[p, g, t]`."""
    places = jnp.arange(evidence.mask.shape[-1])[None, None, :]
    last = jnp.max(jnp.where(evidence.mask > 0, places, -1), axis=-1, keepdims=True)
    rewards = jnp.where(evidence.counted > 0, evidence.rewards, 0)[..., None]
    return jnp.where(places == last, rewards, 0) - evidence.penalties * evidence.mask


def _group_relative(evidence: Evidence, *, scale: str = "group") -> jax.Array:
    return advantages.group_relative(evidence.whole, evidence.counted, scale=scale)


def _leave_one_out(evidence: Evidence) -> jax.Array:
    return advantages.leave_one_out(evidence.whole, evidence.counted)


def _optimal_baseline(evidence: Evidence) -> jax.Array:
    return advantages.optimal_baseline(evidence.whole, jnp.sum(evidence.mask, axis=-1), evidence.counted)


def _greedy_baseline(evidence: Evidence) -> jax.Array:
    return advantages.greedy_baseline(evidence.whole, evidence.greedy, evidence.counted)


def _reinforce_plus_plus(evidence: Evidence) -> jax.Array:
    return advantages.reinforce_plus_plus(_token_rewards(evidence), evidence.mask * evidence.counted[..., None])


def _reinforce_plus_plus_baseline(evidence: Evidence) -> jax.Array:
    return advantages.reinforce_plus_plus_baseline(evidence.whole, evidence.mask, evidence.counted)


def _plain(evidence: Evidence) -> jax.Array:
    return jnp.where(evidence.counted > 0, evidence.whole, 0)


ESTIMATORS: Mapping[str, Estimator] = {
    "group_relative": Estimator(_group_relative, least=2),
    "group_centred": Estimator(partial(_group_relative, scale="none"), least=2),
    "batch_scaled": Estimator(partial(_group_relative, scale="batch"), least=2),
    "leave_one_out": Estimator(_leave_one_out, least=2),
    "optimal_baseline": Estimator(_optimal_baseline, least=2),
    "greedy_baseline": Estimator(_greedy_baseline, greedy=True),
    "reinforce_plus_plus": Estimator(_reinforce_plus_plus),
    "reinforce_plus_plus_baseline": Estimator(_reinforce_plus_plus_baseline, least=2),
    "rewards": Estimator(_plain),
}
