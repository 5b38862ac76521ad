"""Each estimator by its law, on one experience."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.online import ESTIMATORS, Evidence
from ftjax.types import Batch, Scores

REWARDS = np.array([[1.0, 0.0, 0.5, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
MASK = np.ones((2, 4, 3), np.float32)
MASK[0, 0, 2] = MASK[1, 1, :2] = 0
EACH = np.array([REWARDS, [[1.0, 2.0, np.nan, 4.0], [0.0, 0.0, 0.0, 3.0]]], np.float32)
EVIDENCE = Evidence(
    *map(jnp.asarray, (REWARDS, np.ones((2, 4), np.float32), MASK, 0 * MASK)),
    greedy=jnp.array([0.25, 1.0]),
    values=jnp.asarray(0 * MASK),
    opponents=jnp.asarray(1 - REWARDS),
    each=jnp.asarray(EACH),
    weights=jnp.array([1.0, 0.5]),
)


def estimate(name: str, evidence: Evidence = EVIDENCE) -> np.ndarray:
    return np.asarray(ESTIMATORS[name].estimate(evidence)["advantages"])


@pytest.mark.parametrize("name", ["group_relative", "group_centred", "batch_scaled", "leave_one_out"])
def test_the_advantages_of_a_group_sum_to_zero(name):
    found = estimate(name)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-6)
    assert found[0, 0] > found[0, 2] > found[0, 1] == found[0, 3] and not found[1].any()


def test_group_relative_is_unbiased_standardisation():
    centred = REWARDS[0] - REWARDS[0].mean()
    np.testing.assert_allclose(estimate("group_relative")[0], centred / (REWARDS[0].std(ddof=1) + 1e-4), rtol=1e-6)


def test_baselines_that_are_no_mean_of_the_group():
    np.testing.assert_allclose(estimate("greedy_baseline"), (REWARDS - np.array([[0.25], [1.0]]))[..., None] * MASK)
    np.testing.assert_allclose(estimate("rewards"), REWARDS)
    lengths = MASK.sum(axis=-1)
    np.testing.assert_allclose(estimate("optimal_baseline"), REWARDS - ((lengths * REWARDS).sum(1) / lengths.sum(1))[:, None], atol=1e-6)


def test_each_reward_is_standardised_by_itself_and_their_sum_over_the_batch():
    """A group of one value is worth 0; a reward that does not apply to a sample leaves the others to speak of it."""
    each = EACH.astype(np.float64)
    alone = (each - np.nanmean(each, axis=2, keepdims=True)) / (np.nanstd(each, axis=2, ddof=1, keepdims=True) + 1e-4)
    total = np.nan_to_num(alone[0]) + 0.5 * np.nan_to_num(alone[1])
    np.testing.assert_allclose(estimate("decoupled"), (total - total.mean()) / (total.std(ddof=1) + 1e-4), atol=1e-5)
    gone = dataclasses.replace(EVIDENCE, counted=EVIDENCE.counted.at[0, 1].set(0))
    assert estimate("decoupled", gone)[0, 1] == 0


def test_a_sample_is_preferred_by_the_odds_of_its_reward_over_its_opponent_s():
    """Bradley and Terry: a reward of one more is worth odds of e."""
    found = estimate("preferred")
    odds = (0.5 + found) / (0.5 - found)
    np.testing.assert_allclose(odds, np.exp(2 * REWARDS - 1), rtol=1e-4)
    assert found[0, 2] == 0


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
def test_tokens_are_whitened_over_all_of_them(name):
    found = estimate(name)
    assert found.shape == MASK.shape and not found[MASK == 0].any()
    assert found[MASK > 0].mean() == pytest.approx(0, abs=1e-6) and found[MASK > 0].std(ddof=1) == pytest.approx(1, rel=1e-4)


def test_returns_of_gae_are_what_follows_and_values_are_of_the_state_before():
    values = jnp.asarray(np.broadcast_to(np.arange(3.0, dtype=np.float32), MASK.shape))
    found = ESTIMATORS["gae"].estimate(dataclasses.replace(EVIDENCE, values=values), lam=1.0)
    np.testing.assert_allclose(found["returns"], REWARDS[..., None] * MASK, atol=1e-6)


def test_rewards_are_whitened_with_their_mean_before_returns_are_made_of_them():
    """PPO's option: (x - mean) / std + mean of what each token is paid, and at λ = 1 without values the sums of what is to come."""
    kl = np.random.default_rng(0).normal(size=MASK.shape) * MASK
    found = ESTIMATORS["gae"].estimate(
        dataclasses.replace(EVIDENCE, kl=jnp.asarray(kl, jnp.float32), kl_coef=0.5), lam=1.0, whiten_rewards=True
    )
    paid = -0.5 * kl
    for sample in np.ndindex(2, 4):
        paid[sample][np.flatnonzero(MASK[sample])[-1]] += REWARDS[sample]
    real = MASK > 0
    whitened = np.where(real, (paid - paid[real].mean()) / paid[real].std(ddof=1) + paid[real].mean(), 0)
    np.testing.assert_allclose(found["returns"], np.cumsum(whitened[..., ::-1], axis=-1)[..., ::-1] * MASK, rtol=1e-5, atol=1e-6)


def test_a_sample_without_a_reward_moves_no_value():
    """PPO's loss and its gradient are those of a batch in which it is not: nothing draws its values anywhere, not even to 0."""
    draw, at = np.random.default_rng(1), 1
    counted = np.ones((2, 4), np.float32)
    counted[0, at] = 0
    worth = ESTIMATORS["gae"].estimate(dataclasses.replace(EVIDENCE, counted=jnp.asarray(counted)))
    ids = jnp.ones((8, 3), jnp.int32)
    rows = Batch(ids, jnp.asarray(MASK.reshape(8, 3)), ids, ids)
    rows = dataclasses.replace(rows, **{name: x.reshape(8, 3) for name, x in worth.items()})
    logps, values = (jnp.asarray(draw.normal(size=(8, 3)), jnp.float32) for _ in range(2))

    def loss(values, logps, rows):
        return (found := losses.ppo(Scores(logps, values=values), rows, value_coef=0.7)[0]).total / found.weight

    read = jax.value_and_grad(loss, argnums=(0, 1))
    value, gradients = read(values, logps, rows)
    others = np.arange(8) != at
    value_without, without = read(*jax.tree.map(lambda x: x[others], (values, logps, rows)))
    assert value == pytest.approx(float(value_without), rel=1e-6)
    for gradient, wanted in zip(gradients, without, strict=True):
        assert not gradient[at].any() and np.abs(wanted).max() > 0.01
        np.testing.assert_allclose(gradient[others], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_sample_without_a_reward_teaches_nothing(name):
    counted = np.ones((2, 4), np.float32)
    counted[0, 1] = 0
    found = [
        estimate(name, dataclasses.replace(EVIDENCE, counted=jnp.asarray(counted), rewards=EVIDENCE.rewards.at[0, 1].set(value)))
        for value in (0.0, 1e4)
    ]
    np.testing.assert_array_equal(*found)
    assert not found[0][0, 1].any() and np.isfinite(found[0]).all()


UNHELD = ("preferred", "decoupled")
"""Of an opponent the divergence is not known, and of several rewards none is less for it; a config refuses the penalty with both."""


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in UNHELD])
def test_a_divergence_is_taken_from_the_reward_of_its_own_sample(name):
    """Five a token in one sample alone makes it worse than its siblings, and the padding of another has no say."""
    kl = jnp.asarray(0 * MASK).at[0, 0].set(50.0).at[1, 1, 0].set(1e4)
    before, after = estimate(name), estimate(name, dataclasses.replace(EVIDENCE, kl=kl, kl_coef=0.1))
    means = [np.sum(x.reshape(2, 4, -1)[0, 0]) for x in (before, after)]
    assert means[1] < means[0] and np.abs(after).max() < 40
