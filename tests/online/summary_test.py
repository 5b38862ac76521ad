"""The numbers of an experience, counted by hand."""

import numpy as np
import pytest

from ftjax import online, rollout
from ftjax.online.summary import repetition


def test_the_summary_of_three_groups_of_two():
    lengths = (4, 4, 2, 2, 1, 5)
    samples = [rollout.Sample(np.arange(n), np.zeros(n), np.zeros(n), "eos" if n < 5 else "length") for n in lengths]
    rewards = np.array([[1.0, 0.0], [1.0, 1.0], [np.nan, 3.0]])
    each = {"right": rewards, "never": np.full((3, 2), np.nan)}
    found = {name: mean.value() for name, mean in online.summary(online.Experience([], samples, [], rewards, each, rewards, 2.0)).items()}
    assert found.pop("rewards/never") != found
    expected = {
        "reward": 6 / 5,
        "rewards/right": 6 / 5,
        "reward_std": (np.sqrt(0.5) + 0) / 2,  # the third group has no deviation: one of its rewards does not apply
        "zero_variance": 1 / 2,
        "length": 3.0,
        "finished": 5 / 6,
        "repetition": 0.0,
        "sampled_tokens_per_second": 9.0,
        "sampling_seconds": 2.0,
    }
    assert found == pytest.approx(expected)


def test_rewards_that_are_all_equal_have_no_variance_however_their_mean_is_rounded():
    rewards = np.full((2, 7), 0.7, np.float32)
    rewards[1, 0] = 0.6
    samples = [rollout.Sample(np.arange(3), np.zeros(3), np.zeros(3), "eos")] * 14
    assert online.summary(online.Experience([], samples, [], rewards, {}, rewards, 1.0))["zero_variance"].value() == 0.5


def test_repetition_is_the_share_of_phrases_that_were_there_before():
    assert repetition(np.array([7] * 9), size=4) == 5 / 6
    assert repetition(np.arange(9), size=4) == repetition(np.arange(3), size=4) == 0.0
