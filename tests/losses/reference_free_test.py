import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.types import Batch, Scores
from tests.losses.examples import said


def given(logps, mask=None):
    logps = jnp.asarray(logps)
    ints = jnp.zeros(logps.shape, jnp.int32)
    return Scores(logps), Batch(ints, jnp.ones(logps.shape) if mask is None else mask, ints, ints + 1)


def test_orpo_by_hand():
    """p = e^-0.5 and e^-1: odds 1.5415 and 0.58198, log odds ratio 0.97410; 0.5 - 0.1 log σ(0.97410) = 0.53202."""
    loss, metrics = said(losses.orpo, *given([[[-0.2, -0.8], [-1.0, -1.0]]]))
    assert metrics["log_odds_ratio"].value() == pytest.approx(0.97410, rel=1e-4)
    assert loss.value() == pytest.approx(0.53202, rel=1e-4) and metrics["nll"].value() == pytest.approx(0.5)


def test_simpo_compares_per_token_and_cpo_whole_responses():
    """ℓ = (-2, -2) and (-3): SimPO has -2 + 3 = 1, CPO -4 + 3 = -1; margin and β 1: -log σ(0) and -log σ(-1) + 0.5 · 2."""
    mask = jnp.array([[[1.0, 1.0], [1.0, 0.0]]])
    problem = given([[[-2.0, -2.0], [-3.0, 0.0]]], mask)
    assert said(partial(losses.simpo, beta=1.0, margin=1.0), *problem)[0].value() == pytest.approx(math.log(2))
    loss, metrics = said(partial(losses.cpo, beta=1.0, nll_coef=0.5), *problem)
    assert loss.value() == pytest.approx(math.log1p(math.e) + 1.0) and "kl" not in metrics


def test_alphapo_goes_over_into_simpo():
    problem = given([[[-2.0, -1.0], [-3.0, -0.5]]])
    values = [said(partial(losses.simpo, alpha=alpha), *problem)[0].value() for alpha in (0.01, 0.0, -0.01)]
    assert values == sorted(values, reverse=values[0] > values[2]) and len(set(values)) == 3
    np.testing.assert_allclose((values[0] + values[2]) / 2, values[1], rtol=1e-4)


def test_tpo_imitates_the_third_response():
    """β = 1: -log σ(-1 + 3) + 0.5 · 4."""
    loss, metrics = said(partial(losses.tpo, beta=1.0, nll_coef=0.5), *given([[[-1.0], [-3.0], [-4.0]]]))
    assert loss.value() == pytest.approx(math.log1p(math.exp(-2)) + 2.0) and metrics["nll"].value() == 4
    with pytest.raises(ValueError, match=r"\[b, 3, t\]"):
        losses.tpo(*given([[[-1.0], [-3.0]]]))
