"""Where rollouts lead an objective: to the policy of the best reward less β times a divergence, which is known."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.preference_frontier import bandit, online
from experiments.preference_frontier.bandit import Bandit, total_variation
from ftjax import losses, peft, train
from ftjax.types import Batch, Mean

BETA, GROUP, ROLLOUTS, EPOCHS = 1.0, 256, 150, 2
BANDIT = Bandit(np.log([[1, 2, 4, 8], [8, 1, 4, 2]]), np.log([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
OBJECTIVES = online.objectives(BETA)
OBJECTIVES["k2 alone"] = OBJECTIVES["GRPO without scale"]._replace(
    loss=partial(losses.LOSSES["grpo"], kl="k2", kl_coef=BETA, kl_weighted=False)
)


def of_scaled_rewards():
    """Rewards over their own deviation σ under the policy: β has become βσ in each context."""
    policy = BANDIT.reference
    for _ in range(100):
        mean = np.sum(np.exp(policy) * BANDIT.rewards, axis=1, keepdims=True)
        policy = BANDIT.optimum(BETA * np.sqrt(np.sum(np.exp(policy) * (BANDIT.rewards - mean) ** 2, axis=1, keepdims=True)))
    return policy


REACHES = dict.fromkeys(OBJECTIVES, BANDIT.optimum(BETA)) | {
    "GRPO": of_scaled_rewards(),
    "GRPO without scale, k3 alone": BANDIT.optimum(BETA, "forward_kl"),
}
"""Where the mean gradient is 0. That of k3, when it is not multiplied by the ratio, is the gradient of KL(π_ref ‖ π)."""


def spread(key, logps):
    """Draw a group whose shares are the policy's, to one response: what is tested is where the mean gradient leads."""
    places = (jnp.arange(float(GROUP)) + jax.random.uniform(key)) / GROUP
    below = jnp.cumsum(jnp.exp(logps), axis=1)
    return jnp.minimum(jax.vmap(partial(jnp.searchsorted, side="right"))(below, jnp.stack([places] * len(logps))), logps.shape[1] - 1)


class Rollouts(NamedTuple):
    """A batch of each objective, as one for `train.make_train_step`."""

    batches: dict[str, Batch]

    @property
    def loss_mask(self):
        return jnp.stack([batch.loss_mask for batch in self.batches.values()])


def score(params, rollouts):
    return {name: bandit.score(params[name], batch) for name, batch in rollouts.batches.items()}


def together(scores, rollouts):
    """The sum of the objectives, each over its own table and rollouts."""
    found = [OBJECTIVES[name].loss(scores[name], batch)[0] for name, batch in rollouts.batches.items()]
    return Mean(sum(mean.total / mean.weight for mean in found), jnp.ones(())), {}


@pytest.fixture(scope="module")
def reached():
    """The policies at the end."""
    method = peft.full(".*")
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, ROLLOUTS * EPOCHS))
    frozen, trainable = method.init(jax.random.key(0), dict.fromkeys(OBJECTIVES, bandit.start(BANDIT)))
    step = train.make_train_step(score, method, together, optimizer)
    state = train.init_state(jax.random.key(0), trainable, method, optimizer)

    @jax.jit
    def rollouts(key, trainable):
        params = method.attach(frozen, trainable)
        return Rollouts(
            {name: online.rollout(objective, BANDIT, params[name], partial(spread, key)) for name, objective in OBJECTIVES.items()}
        )

    for number in range(ROLLOUTS):
        batches = rollouts(jax.random.fold_in(state.key, number), state.trainable)
        for _ in range(EPOCHS):
            state, _ = step(state, frozen, batches)
    return {name: bandit.policy(table) for name, table in method.attach(frozen, state.trainable).items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_reaches_the_policy_that_theory_says(name, reached):
    assert total_variation(BANDIT.reference, REACHES[name]) > 0.1
    assert total_variation(reached[name], REACHES[name]) < 5e-3
