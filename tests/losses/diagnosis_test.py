import dataclasses
import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses
from ftjax.losses.diagnosis import SATURATED
from ftjax.types import Batch, Mean, Scores
from tests.losses.examples import said


def given(logps, lengths=None, **fields):
    """Log-probabilities of responses, whose first tokens count: as log-ratios too, against a reference that says 0."""
    logps = np.asarray(logps, np.float32)
    lengths = np.full(logps.shape[:-1], logps.shape[-1]) if lengths is None else np.asarray(lengths)
    mask, ints = (np.arange(logps.shape[-1]) < lengths[..., None]).astype(np.float32), np.zeros(logps.shape, np.int32)
    return Scores(logps * mask), Batch(ints, mask, ints, ints + 1, reference_logps=0 * logps, **fields)


def values(loss, problem):
    return {name: mean.value() for name, mean in said(loss, *problem)[1].items()}


def test_what_pairs_say_by_hand():
    """β = 0.5; log-ratios (1 + 3, -2) and (-1 - 1, 6): rewards (2, -1) and (-1, 3), margins 3 and -4."""
    found = values(partial(losses.dpo, beta=0.5), given([[[1.0, 3.0], [-2.0, 0.0]], [[-1.0, -1.0], [6.0, 0.0]]], [[2, 1], [2, 1]]))
    assert found["rewards/square"] == (4 + 1 + 1 + 9) / 4 and found["rewards/margin_square"] == (9 + 16) / 2
    assert found["logratio/chosen"] == (4 - 2) / 2 and found["logratio/rejected"] == (-2 + 6) / 2
    assert found["kl"] == (1 + 9 + 4 + 1 + 1 + 36) / 2 / 6 and found["length/rejected"] == 1


def test_a_uniform_reference_is_none():
    found = values(losses.cpo, given([[[1.0, 3.0], [-2.0, 0.0]]]))
    assert not {"kl", "logratio/chosen", "logratio/rejected"} & found.keys()


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco", "npo"])
def test_what_single_responses_say_by_hand(name):
    """β = 0.5; log-ratios 4 of two tokens, -2 of one, -1 of one; the last two are undesirable; a row of padding does not count."""
    problem = given([[1.0, 3.0], [-2.0, 0.0], [-1.0, 0.0], [5.0, 5.0]], [2, 1, 1, 0], desirable=jnp.array([1.0, 0.0, 0.0, 1.0]))
    batch = losses.with_baseline(problem[1], Mean(jnp.asarray(0.25), jnp.ones(())))
    found = values(partial(losses.LOSSES[name], beta=0.5), (problem[0], batch))
    assert found["logratio/desirable"] == 4 and found["logratio/undesirable"] == -1.5
    assert found["rewards/desirable"] == 2 and found["rewards/undesirable"] == -0.75 and found["rewards/square"] == (4 + 1 + 0.25) / 3
    assert found["length/desirable"] == 2 and found["length/undesirable"] == 1 and found["kl"] == (1 + 9 + 4 + 1) / 2 / 4
    known = {"kto": {"baseline": 0.25}, "bco": {"delta": 0.25}}
    assert {key: found[key] for key in ("baseline", "delta") if key in found} == known.get(name, {})


def test_saturated_is_the_share_beyond_one_percent_of_the_gradient():
    """σ(-log 99) = 0.01. Margins 4.5, 4.7 and -4.7 around log 99 = 4.595: two of three; one with m = 1, or z = 0.3."""
    assert 1 / (1 + math.exp(SATURATED)) == pytest.approx(0.01)
    chosen = jnp.array([4.5, 4.7, -4.7])
    pairs = given(jnp.stack([chosen, 0 * chosen], axis=1)[..., None])
    assert values(partial(losses.dpo, beta=1.0), pairs)["saturated"] == pytest.approx(2 / 3)
    valued = dataclasses.replace(pairs[0], values=pairs[0].logps)
    for batch, share in ((pairs[1], 2 / 3), (dataclasses.replace(pairs[1], margins=jnp.ones(3)), 1 / 3)):
        assert values(losses.bradley_terry, (valued, batch))["saturated"] == pytest.approx(share)
    rows = given(chosen[:, None], desirable=jnp.ones(3))
    batch = losses.with_baseline(rows[1], Mean(jnp.asarray(0.3), jnp.ones(())))
    assert values(partial(losses.kto, beta=1.0), (rows[0], batch))["saturated"] == pytest.approx(1 / 3)


def test_rewards_have_the_spread_of_their_squares():
    """Rewards 1, -2 and 4, 3: the mean of r² is 30 / 4, margins are 3 and 1, with 5 as the mean of their squares and 1 as variance."""
    rewards = jnp.array([[1.0, -2.0], [4.0, 3.0]])[..., None]
    found = values(losses.bradley_terry, (Scores(0 * rewards, values=rewards), given(rewards)[1]))
    assert found["rewards/square"] == 7.5 and found["rewards/margin_square"] - found["rewards/margin"] ** 2 == 1


EQUAL = [[[-2.0, -2.0], [-2.0, -2.0]]]
SHARES = {
    # c/len = 1/2 beside βσ(0) = 1/4
    "rpo": ({"beta": 0.5, "nll_coef": 1.0}, 2 / 3),
    # log p = -2 and 1 / (1 - p) is the slope of the log odds: 1 beside 0.1 σ(0) / (1 - e^-2)
    "orpo": ({"beta": 0.1}, 1 / (1 + 0.05 / (1 - math.exp(-2)))),
    # per token: 3 beside 2 σ(0); AlphaPO's reward has the slope p^-α = e
    "simpo": ({"beta": 2.0, "margin": 0.0, "nll_coef": 3.0}, 3 / 4),
    "alphapo": ({"beta": 2.0, "margin": 0.0, "nll_coef": 3.0, "alpha": 0.5}, 3 / (3 + math.e)),
    # a half of smoothed labels pulls as much away
    "cpo": ({"beta": 0.5, "nll_coef": 1.0, "label_smoothing": 0.5}, 1.0),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_share_of_the_nll_by_hand(name):
    options, share = SHARES[name]
    assert values(partial(losses.LOSSES[name], **options), given(EQUAL))["nll/share"] == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize(("name", "beta", "share"), [("tpo", 1.0, 0.5), ("tpo_l", 2.0, 2 / 3)])
def test_the_share_of_the_gold_response_by_hand(name, beta, share):
    """Per token of the gold response, of 2, 1/2; per token of the chosen one, of 4: βσ(0) = 1/2 in sum, 2/4 σ(0) = 1/4 on average."""
    options = {"beta": beta} | ({"margin": 0.0} if name == "tpo_l" else {})
    problem = given([[[-1.0] * 4, [-1.0] * 4, [-3.0] * 4]], [[4, 4, 2]])
    assert values(partial(losses.LOSSES[name], **options), problem)["nll/share"] == pytest.approx(share, rel=1e-6)


def test_the_nll_has_all_of_the_gradient_of_a_saturated_pair_and_no_share_without_a_coefficient():
    won = given([[[50.0, 50.0], [-50.0, -50.0]]])
    assert values(partial(losses.rpo, beta=1.0), won)["nll/share"] == 1
    for name in ("dpo", "simpo"):
        assert "nll/share" not in values(losses.LOSSES[name], won)
