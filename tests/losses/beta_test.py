"""β of every objective that has one: what it may be, and what is left of the loss as it goes to 0."""

import dataclasses
import inspect
from functools import partial

import jax
import numpy as np
import pytest

from ftjax import losses
from tests.losses.examples import NAMED, make_problems

SCALED = [name for name, loss in losses.LOSSES.items() if "beta" in inspect.signature(loss).parameters]
WEIGHED = ("orpo", "nash_md")  # where it is the weight of a term, which an ablation leaves out
SMALL = (1e-3, 1e-6)


def first_example(name):
    return NAMED[f"{name}0"]


@pytest.fixture(scope="module")
def problems():
    return make_problems()


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("beta", [-0.1, 0.0, float("nan")])
def test_a_beta_that_learns_nothing_or_the_reverse_is_refused(name, beta, problems):
    problem, loss = problems[first_example(name).form], partial(losses.LOSSES[name], beta=beta)
    if beta == 0 and name in WEIGHED:
        assert jax.eval_shape(loss, *problem)[0].total.shape == ()
        return
    with pytest.raises(ValueError, match="beta is 0 or more" if name in WEIGHED else "beta is above 0"):
        jax.eval_shape(loss, *problem)


@pytest.fixture(scope="module")
def found(problems):
    """Value and gradient of every objective with a β that is almost 0, in float32 and in float64."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def evaluate(problems):
        def total(logps, loss, scores, batch):
            return loss(dataclasses.replace(scores, logps=logps), batch)[0].total

        each = [(name, beta, *problems[first_example(name).form]) for name in SCALED for beta in SMALL]
        return {
            (name, beta): jax.value_and_grad(total)(scores.logps, partial(first_example(name).loss, beta=beta), scores, batch)
            for name, beta, scores, batch in each
        }

    with jax.enable_x64(True):
        exact = jax.device_get(evaluate(make_problems(np.float64)))
    return jax.device_get(evaluate(problems)), exact


@pytest.mark.parametrize("name", SCALED)
def test_a_beta_close_to_0_has_the_value_and_the_gradient_of_float64(name, found):
    for beta in SMALL:
        (value, gradient), (exact, slope) = (each[name, beta] for each in found)
        assert np.isfinite(value) and np.abs(slope).max() > 0
        np.testing.assert_allclose(value, exact, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())
