"""A sampler that is not the trainer is found out, and rounding is not."""

import dataclasses

import jax
import numpy as np
import pytest

from ftjax import data, online, rollout, scoring
from tests import tiny

PROMPTS = [np.arange(1, 1 + n) for n in (3, 6, 1, 4)]


@pytest.fixture(scope="module")
def params():
    return tiny.init(jax.random.key(1))


@pytest.fixture(scope="module")
def sample(params):
    """`sample(temperature, params) -> batch`."""
    keys = jax.random.split(jax.random.key(2), (len(PROMPTS), 1))
    engine = rollout.Engine(tiny.MODEL, (3,), slots=4, slot_tokens=16)

    def draw(temperature=1.0, params=params):
        sampler = online.sampler(engine, max_tokens=8, sampling=rollout.settings(temperature=temperature))
        return online.rows(PROMPTS, sampler(params, [data.Prompt(tokens, data.Example()) for tokens in PROMPTS], keys), max_tokens=32)

    return draw


@pytest.fixture(scope="module")
def score():
    look = jax.jit(
        lambda params, batch, temperature: scoring.score(tiny.MODEL, params, batch, temperature=temperature).logps, static_argnums=2
    )
    return lambda params, batch, temperature=1.0: np.asarray(look(params, batch, temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_program_agrees_with_itself(temperature, params, sample, score):
    batch = sample(temperature)
    gap = online.check_agreement(batch.behavior_logps, score(params, batch, temperature), batch.loss_mask, dtype="float32")
    assert 0 <= gap.mean <= gap.most < 1e-5


def test_another_temperature_other_weights_and_other_positions_are_found_out(params, sample, score):
    other = jax.tree.map(lambda x: x * 1.02, params)
    moved = dataclasses.replace(sample(), positions=sample().positions + 3 * (np.arange(16) > 4).astype(np.int32)[None])
    for batch, logps in ((sample(0.9), score(params, sample(0.9))), (sample(params=other), score(params, sample(params=other)))):
        with pytest.raises(ValueError, match="the sampler and the trainer disagree .* rounding in float32"):
            online.check_agreement(batch.behavior_logps, logps, batch.loss_mask, dtype="float32")
    with pytest.raises(ValueError, match="positions or masks"):
        online.check_agreement(moved.behavior_logps, score(params, moved), moved.loss_mask, dtype="float32")


def test_what_is_not_finite_does_not_agree_and_what_was_not_sampled_does_not_matter():
    one, mask = np.zeros((1, 3)), np.array([[0.0, 1.0, 1.0]])
    assert online.disagreement(one, np.array([[9.0, 0.5, 0.0]]), mask) == (0.25, 0.5)
    with pytest.raises(ValueError, match="inf"):
        online.check_agreement(one, np.array([[0.0, np.nan, 0.0]]), mask, dtype="bfloat16")
