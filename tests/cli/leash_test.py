"""The adaptive coefficient goes where Ziegler's controller goes, and is remembered by experience."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from ftjax.cli.leash import Leash

ALL = np.ones(4, bool)


def config(**changes):
    return ConfigDict({"rollout": {"kl_penalty": 0.2, "kl_target": 6.0, "kl_horizon": 100, **changes}})


def controlled(kls, *, coef=0.2, target=6.0, horizon=100, samples=4):
    """The definition, in float64."""
    found = []
    for kl in kls:
        found.append(coef)
        coef *= 1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon
    return found


def test_the_coefficient_follows_the_divergence_to_its_target():
    kls = [0.0, 5.5, 6.0, 6.5, 40.0, -1.0]
    leash, found = Leash(config(), {}), []
    for index, kl in enumerate(kls):
        found.append(leash.coef(index))
        metrics = leash.follow(index, np.array([kl - 1, kl + 1, kl, kl], np.float32), ALL)
        assert metrics["kl/sampled"].value() == pytest.approx(kl) and metrics["kl_coef"].value() == pytest.approx(found[-1])
    np.testing.assert_allclose(found, controlled(kls), rtol=1e-6)
    assert found[1] < found[0] and found[5] > found[4]


def test_a_coefficient_comes_back_from_a_record_bit_for_bit_and_old_ones_are_let_go():
    coefs = {}
    leash = Leash(config(), coefs)
    for index in range(5):
        leash.follow(index, np.full(4, 1.0 + index, np.float32), ALL)
    assert set(coefs) == {"4", "5"}
    again = Leash(config(), json.loads(json.dumps(coefs)))
    assert (again.coef(4), again.coef(5)) == (leash.coef(4), leash.coef(5))


def test_samples_of_which_no_token_counts_say_nothing_of_the_divergence():
    """Two of four were cut: the mean is of the others, 8 nats and not 4, so the coefficient rises, as after an experience of two."""
    leash = Leash(config(), {})
    metrics = leash.follow(0, np.array([7.0, 0.0, 9.0, 0.0], np.float32), np.array([True, False, True, False]))
    assert metrics["kl/sampled"].value() == 8.0
    assert leash.coef(1) > leash.coef(0) and leash.coef(1) == pytest.approx(controlled([8.0, 0.0], samples=2)[1])
    metrics = leash.follow(1, np.zeros(4, np.float32), np.zeros(4, bool))
    assert leash.coef(2) == leash.coef(1) and not metrics["kl/sampled"].weight


def test_without_a_target_the_penalty_stays():
    leash = Leash(config(kl_target=0.0), coefs := {})
    leash.follow(0, np.full(4, 99.0, np.float32), ALL)
    assert leash.coef(1) == 0.2 and not coefs
