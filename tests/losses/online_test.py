from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Batch, Scores
from tests.losses.examples import said


def batch_of(logps, **fields):
    ints = jnp.zeros(logps.shape, jnp.int32)
    return Batch(ints, jnp.ones(logps.shape), ints, ints + 1, **fields)


def test_xpo_by_hand():
    """The policy's response has gained 2, its reference's 1. Where the first won Δ = 1, else -1; plus α (-3 + 1) of the second."""
    reference = jnp.full((2, 2, 1), -3.0)
    logps = reference + jnp.array([[[2.0], [1.0]]] * 2)
    batch = batch_of(logps, reference_logps=reference, desirable=jnp.array([1.0, 0.0]))
    loss, metrics = said(partial(losses.xpo, beta=1.0, alpha=0.1), Scores(logps), batch)
    assert loss.value() == pytest.approx((np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2 - 0.2)
    assert metrics["wins"].value() == 0.5 and metrics["logps/reference"].value() == -2 and metrics["rewards/accuracy"].value() == 0.5


def test_nash_md_stops_where_the_divergence_outweighs_the_preference():
    """p - ½ = 0.3 and β = 0.1: the gradient is 0 at log π/π_ref = 3, and is for the response below and against it above."""
    reference = jnp.full((1, 3), -5.0)
    batch = batch_of(reference, reference_logps=reference, advantages=jnp.array([0.3]))
    total = lambda x: losses.nash_md(Scores(x), batch)[0].total  # noqa: E731
    gradient = jax.jit(jax.grad(total))(reference + jnp.array([[0.0, 3.0, 4.0]]))
    np.testing.assert_allclose(gradient, [[-0.3, 0.0, 0.1]], atol=1e-6)


def test_what_is_missing_is_an_error():
    pair, row = jnp.zeros((1, 2, 3)), jnp.zeros((1, 3))
    with pytest.raises(ValueError, match="desirable"):
        losses.xpo(Scores(pair), batch_of(pair, reference_logps=pair))
    with pytest.raises(ValueError, match="with_reference"):
        losses.xpo(Scores(pair), batch_of(pair, desirable=jnp.ones(1)))
    with pytest.raises(ValueError, match="advantages"):
        losses.nash_md(Scores(row), batch_of(row, reference_logps=row))
