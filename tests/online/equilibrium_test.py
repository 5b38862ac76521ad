"""Where opponents and selections lead on a bandit, whose equilibrium and whose best of k are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.preference_frontier import bandit
from experiments.preference_frontier.bandit import Bandit, total_variation
from ftjax import losses, online
from ftjax.online import ESTIMATORS, Evidence
from ftjax.types import Batch

BANDIT = Bandit(np.log([[1.0, 3.0, 9.0, 27.0], [27.0, 1.0, 9.0, 3.0]]), np.log([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
BETA, SHARE, GROUP, STEPS = 0.25, 0.5, 512, 300


def equilibrium() -> np.ndarray:
    """π ∝ π_ref exp(p/β), p an arm's probability to beat the mixture of π and π_ref: Nash-MD's gradient is 0 there and nowhere else."""
    policy = BANDIT.reference
    for _ in range(500):
        mixture = np.exp((1 - SHARE) * policy + SHARE * BANDIT.reference)
        beats = np.einsum("cij,cj->ci", BANDIT.preferences, mixture / mixture.sum(axis=1, keepdims=True))
        following = BANDIT.reference + beats / BETA
        following -= np.log(np.sum(np.exp(following), axis=1, keepdims=True))
        policy = (policy + following) / 2
        policy -= np.log(np.sum(np.exp(policy), axis=1, keepdims=True))
    return policy


def spread(key, logps):
    """Draw a group whose shares are the policy's, to one response, in any order."""
    first, second = jax.random.split(key)
    places = (jnp.arange(float(GROUP)) + jax.random.uniform(first)) / GROUP
    below = jnp.cumsum(jnp.exp(logps), axis=1)
    arms = jnp.minimum(jax.vmap(lambda edges: jnp.searchsorted(edges, places, side="right"))(below), logps.shape[1] - 1)
    return jax.random.permutation(second, arms, axis=1, independent=True)


def test_nash_md_reaches_its_equilibrium():
    rewards, reference = (jnp.asarray(x, jnp.float32) for x in (BANDIT.rewards, BANDIT.reference))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))
    contexts = jnp.broadcast_to(jnp.arange(2)[:, None], (2, GROUP))

    def step(carry, key):
        params, state = carry
        ours, theirs = jax.random.split(key)
        logps = jax.nn.log_softmax(params["policy"]["kernel"])
        arms, opponents = spread(ours, logps), spread(theirs, jax.nn.log_softmax((1 - SHARE) * logps + SHARE * reference))
        worth = [jnp.take_along_axis(rewards, at, axis=1) for at in (arms, opponents)]
        nothing = jnp.zeros((2, GROUP, 2))
        evidence = Evidence(worth[0], jnp.ones_like(worth[0]), nothing, nothing, opponents=worth[1])
        found = ESTIMATORS["preferred"].estimate(evidence)
        batch = jax.tree.map(lambda x: x.reshape(2 * GROUP, *x.shape[2:]), bandit.batch(BANDIT, contexts, arms, **found))
        total = lambda params: losses.nash_md(bandit.score(params, batch), batch, beta=BETA)[0]  # noqa: E731
        gradient = jax.grad(lambda params: total(params).total / total(params).weight)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = bandit.start(BANDIT)
    with jax.numpy_dtype_promotion("standard"):  # of optax's step counts
        run = jax.jit(lambda params, keys: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
        found = bandit.policy(run(params, jax.random.split(jax.random.key(0), STEPS)))
    assert total_variation(BANDIT.reference, equilibrium()) > 0.3
    assert total_variation(found, equilibrium()) < 0.01


def test_what_rejection_sampling_keeps_of_the_reference_is_its_best_of_k():
    rng, k, count = np.random.default_rng(0), 4, 20_000
    for context in range(2):
        arms = rng.choice(4, p=np.exp(BANDIT.reference[context]), size=(count, k))
        rows = np.stack([np.zeros(count * k, np.int32), arms.reshape(-1)], axis=1)
        mask = np.broadcast_to(np.array([0, 1], np.float32), rows.shape)
        kept = online.best(Batch(rows, mask, rows, rows), BANDIT.rewards[context][arms])
        shares = np.bincount(kept.tokens[:, 1], minlength=4) / count
        np.testing.assert_allclose(shares, np.exp(BANDIT.best_of(k)[context]), atol=4 * np.sqrt(0.25 / count))
