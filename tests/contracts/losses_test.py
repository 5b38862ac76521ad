"""What every objective must keep: a new one joins by a line in EXAMPLES."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Batch, Mean, Scores

B, T = 4, 6
EXAMPLES = {"sft": [losses.sft, partial(losses.sft, label_smoothing=0.1)]}
CASES = [pytest.param(loss, id=f"{name}{n}") for name, examples in EXAMPLES.items() for n, loss in enumerate(examples)]


def test_every_loss_is_listed():
    assert set(EXAMPLES) == set(losses.LOSSES)


@pytest.fixture
def problem(key):
    keys = jax.random.split(key, 5)
    mask = (jax.random.uniform(keys[0], (B, T)) > 0.4).astype(jnp.float32)
    ints = jnp.broadcast_to(jnp.arange(T), (B, T))
    logps, mean_logps = -jax.random.uniform(keys[1], (B, T)) * mask, -3 * jax.random.uniform(keys[2], (B, T)) * mask
    entropy = jax.random.uniform(keys[3], (B, T)) * mask
    return Scores(logps, entropy=entropy, mean_logps=mean_logps, greedy=mask), Batch(ints, mask, ints, jnp.ones_like(ints))


def total(loss, logps, scores, batch):
    return loss(Scores(logps, scores.entropy, scores.mean_logps, scores.greedy), batch)[0].total


@pytest.mark.parametrize("loss", CASES)
def test_values_are_means_that_add_over_micro_batches(loss, problem):
    parts = [loss(*jax.tree.map(lambda x, h=h: x[h * B // 2 : (h + 1) * B // 2], problem)) for h in range(2)]
    whole = loss(*problem)
    added = jax.tree.map(jnp.add, *parts)
    assert isinstance(whole[0], Mean) and all(isinstance(value, Mean) for value in whole[1].values())
    chex.assert_trees_all_close(added, whole, rtol=1e-6)


@pytest.mark.parametrize("loss", CASES)
def test_masked_tokens_change_neither_value_nor_gradient(loss, problem):
    scores, batch = problem
    noise = jnp.where(batch.loss_mask > 0, scores.logps, -1e4)
    got, expected = (jax.value_and_grad(partial(total, loss))(logps, scores, batch) for logps in (noise, scores.logps))
    chex.assert_trees_all_equal(got, expected)
    assert float(jnp.abs(got[1] * (1 - batch.loss_mask)).max()) == 0 and float(jnp.abs(got[1]).max()) > 0


@pytest.mark.parametrize("loss", CASES)
def test_extreme_log_probabilities_stay_finite(loss, problem):
    scores, batch = problem
    value, gradient = jax.value_and_grad(partial(total, loss))(jnp.full((B, T), -1e4), scores, batch)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", CASES)
def test_the_gradient_is_that_of_finite_differences(loss, problem):
    scores, batch = problem
    gradient = jax.grad(partial(total, loss))(scores.logps, scores, batch)
    for row, column in [(0, 0), (1, 3), (3, 5)]:
        step = jnp.zeros((B, T)).at[row, column].set(0.125)
        ahead, behind = (total(loss, scores.logps + sign * step, scores, batch) for sign in (1, -1))
        np.testing.assert_allclose(gradient[row, column], (ahead - behind) / 0.25, rtol=1e-3, atol=1e-5)
