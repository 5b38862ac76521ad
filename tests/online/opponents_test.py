"""Duels by hand: each sample with the one in its place, and what is not decided counts nowhere."""

import dataclasses

import numpy as np
import pytest

from ftjax import online, rollout
from ftjax.types import Batch

REWARDS = np.array([[1.0, 0.0], [0.5, np.nan]], np.float32)
OPPOSED = np.array([[0.0, 2.0], [0.5, 1.0]], np.float32)


def batch(width: int, first: int) -> Batch:
    rows = np.arange(first, first + 4 * width).reshape(4, width)
    return Batch(rows, np.ones((4, width), np.float32), rows, np.ones((4, width), np.int32))


def test_each_sample_meets_the_one_in_its_place_and_the_better_is_known():
    found = online.duels(batch(2, 0), batch(3, 100), REWARDS, OPPOSED)
    assert found.tokens.shape == (4, 2, 3)
    np.testing.assert_array_equal(found.tokens[1], [[2, 3, 0], [103, 104, 105]])
    np.testing.assert_array_equal(found.desirable, [1, 0, 0, 0])
    np.testing.assert_array_equal(found.loss_mask[:, 0], [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found.loss_mask[:, 1], [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found.segment_ids[0], [[1, 1, 0], [1, 1, 1]])


def test_a_sample_that_was_cut_is_in_no_duel():
    """Neither it nor the one that it is compared with, which would be pushed by itself."""
    rewards, ours = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32), batch(2, 0)
    theirs = dataclasses.replace(ours, loss_mask=ours.loss_mask * np.array([[1], [1], [0], [1]], np.float32))
    ours = dataclasses.replace(ours, loss_mask=ours.loss_mask * np.array([[1], [0], [1], [1]], np.float32))
    found = online.duels(ours, theirs, rewards, 1 - rewards)
    np.testing.assert_array_equal(found.loss_mask[..., 0], [[1, 1], [0, 0], [0, 0], [1, 1]])


def test_a_contest_counts_a_tie_as_half_and_leaves_out_what_has_no_reward():
    samples = [rollout.Sample(*[np.zeros(n)] * 3, "eos") for n in (1, 2, 3, 4)]
    others = online.Experience([], samples, [], OPPOSED, {}, OPPOSED, 1.0)
    found = online.contest(online.Experience([], samples, [], REWARDS, {}, REWARDS, 1.0, others))
    assert {name: mean.value() for name, mean in found.items()} == {
        "opponent/reward": pytest.approx(3.5 / 4),
        "opponent/length": 2.5,
        "opponent/wins": pytest.approx((1 + 0 + 0.5) / 3),
    }
