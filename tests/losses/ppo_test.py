from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.losses import shaping
from ftjax.types import Batch, Scores
from tests.losses.examples import said


def batch_of(logps, **fields):
    ints = jnp.zeros(logps.shape, jnp.int32)
    return Batch(ints, jnp.zeros(logps.shape).at[:, 1:].set(1), ints, ints + 1, **fields)


def test_a_value_that_has_moved_beyond_its_clip_towards_the_return_stops_and_one_that_moved_away_goes_on():
    """V_old 0, clip 0.2; returns ±1. V = 0.5 towards 1 has the clipped error (1 - 0.2)² and no gradient; towards -1 it has V - R = 1.5."""
    logps = jnp.zeros((2, 2))
    batch = batch_of(logps, advantages=jnp.zeros(2), returns=jnp.array([[0.0, 1.0], [0.0, -1.0]]), old_values=logps)
    loss = lambda values: losses.ppo(Scores(logps, values=values), batch, value_coef=1.0)[0].total  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array([[0.5, 9.0], [0.5, 9.0]]))
    assert value == pytest.approx((0.8**2 + 1.5**2) / 2)
    np.testing.assert_allclose(gradient, [[0, 0], [1.5, 0]], rtol=1e-6)


def test_at_the_first_step_ratio_and_values_are_their_own_anchors():
    logps, values = jnp.full((2, 3), -2.0), jnp.array([[0.1, 3.0, 0.0], [5.0, -4.0, 0.0]])
    batch = batch_of(logps, advantages=jnp.ones(2), returns=jnp.ones((2, 3)))
    _, metrics = said(losses.ppo, Scores(logps, values=values), batch)
    assert metrics["ratio"].value() == 1 and metrics["clip/value"].value() == 0
    assert metrics["value/error"].value() == pytest.approx(np.mean([0.9**2, 4, 16, 25]))


@pytest.mark.parametrize("missing", ["values", "returns"])
def test_missing_values_and_returns_are_errors(missing):
    row = jnp.zeros((1, 2))
    scores, batch = Scores(row, values=None if missing == "values" else row), batch_of(row, advantages=jnp.ones(1), returns=None)
    with pytest.raises(ValueError, match=missing):
        losses.ppo(scores, batch)


MASK = np.array([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.float32)
KL = np.arange(18, dtype=np.float32).reshape(3, 6)


def test_the_reward_is_paid_at_the_last_token_and_the_divergence_at_each():
    found = jax.jit(partial(shaping.token_rewards, kl_coef=0.1))(jnp.array([5.0, -3.0, 7.0]), KL, MASK)
    expected = -0.1 * KL * MASK + np.array([[0, 0, 0, 0, 5, 0], [0, 0, 0, 0, 0, -3], [0] * 6])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    of_responses = shaping.response_rewards(jnp.array([5.0, -3.0, 7.0]), KL, MASK, kl_coef=0.1)
    np.testing.assert_allclose(found.sum(1)[:2], of_responses[:2], rtol=1e-6)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98), (-3.0, 0.98)])
def test_the_coefficient_follows_the_divergence_by_a_fifth_at_most(kl, factor):
    assert shaping.adaptive_kl_coef(0.2, kl, target=6.0) == pytest.approx(0.2 * factor)


def test_a_response_that_did_not_end_pays_or_is_left_out():
    finished = jnp.array([1, 0, 1])
    np.testing.assert_allclose(shaping.less_unfinished(jnp.array([0.5, 2.0, -1.0]), finished, penalty=1.5), [0.5, 0.5, -1.0])
    np.testing.assert_array_equal(shaping.without_unfinished(MASK, finished), MASK * [[1], [0], [1]])


def test_rewards_are_clipped():
    np.testing.assert_allclose(shaping.clip_rewards(jnp.array([-99.0, 3.0, 99.0]), high=5.0), [-10, 3, 5])


def test_the_value_of_a_state_is_that_of_the_token_before():
    np.testing.assert_array_equal(shaping.state_values(KL)[1], [0, 6, 7, 8, 9, 10])
