import dataclasses
import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Batch, Scores
from tests.losses.examples import said

VALUES = jnp.array([[[9.0, 2.0, 7.0], [9.0, 9.0, -1.0]]])
SEGMENTS = jnp.array([[[1, 1, 0], [1, 1, 1]]])
BATCH = Batch(0 * SEGMENTS, jnp.ones(SEGMENTS.shape), 0 * SEGMENTS, SEGMENTS)
SCORES = Scores(jnp.zeros(SEGMENTS.shape), values=VALUES)


def test_the_reward_of_a_response_is_the_value_at_its_last_token():
    np.testing.assert_array_equal(losses.response_rewards(SCORES, BATCH), [[2.0, -1.0]])
    padding = dataclasses.replace(BATCH, segment_ids=SEGMENTS.at[0, 1].set(0))
    np.testing.assert_array_equal(losses.response_rewards(SCORES, padding), [[2.0, 0.0]])


def test_bradley_terry_by_hand():
    """Rewards 2 and -1, margin 1: -log σ(2) + 0.1 · (2 - 1)² = 0.12693 + 0.1."""
    loss, metrics = said(partial(losses.bradley_terry, centering_coef=0.1), SCORES, dataclasses.replace(BATCH, margins=jnp.ones(1)))
    assert loss.value() == pytest.approx(0.22693, rel=1e-4)
    assert metrics["rewards/margin"].value() == 3 and metrics["rewards/accuracy"].value() == 1 and metrics["rewards/square"].value() == 2.5


def test_equal_rewards_cost_log_2_and_are_half_right():
    loss, metrics = said(losses.bradley_terry, Scores(SCORES.logps, values=0 * VALUES), BATCH)
    assert loss.value() == pytest.approx(math.log(2)) and metrics["rewards/accuracy"].value() == 0.5


def test_steps_are_classified_where_they_end():
    """Two steps: v = 2, right: log(1 + e^-2) = 0.12693; v = 1, wrong: log(1 + e) = 1.31326; the mean is 0.72009."""
    ints = jnp.zeros((1, 4), jnp.int32)
    batch = Batch(ints, jnp.array([[0.0, 1.0, 0.0, 1.0]]), ints, ints + 1, labels=jnp.array([[0.0, 1.0, 1.0, 0.0]]))
    loss, metrics = said(losses.stepwise, Scores(jnp.zeros((1, 4)), values=jnp.array([[5.0, 2.0, -5.0, 1.0]])), batch)
    assert loss.value() == pytest.approx(0.72009, rel=1e-4)
    assert metrics["accuracy"].value() == 0.5 and metrics["accuracy/wrong"].value() == 0 and metrics["labels"].value() == 0.5


def test_values_that_were_not_scored_are_an_error():
    for loss in (losses.bradley_terry, losses.stepwise):
        with pytest.raises(ValueError, match="value"):
            loss(Scores(SCORES.logps), BATCH)
    with pytest.raises(ValueError, match=r"\[b, 2, t\]"):
        losses.bradley_terry(Scores(VALUES[0], values=VALUES[0]), dataclasses.replace(BATCH, segment_ids=SEGMENTS[0]))
