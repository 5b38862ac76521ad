"""What is kept of the samples of three prompts, by hand."""

import dataclasses

import numpy as np
import pytest

from ftjax import online
from ftjax.types import Batch

ROWS = Batch(np.arange(12).reshape(6, 2), *[np.ones((6, 2), np.float32)] * 3)
REWARDS = np.array([[0.0, 1.0], [np.nan, np.nan], [-2.0, -2.0]], np.float32)


def test_the_best_of_each_prompt_is_kept_if_it_is_good_enough():
    found = online.best(ROWS, REWARDS)
    np.testing.assert_array_equal(found.tokens[[0, 2]], ROWS.tokens[[1, 4]])
    np.testing.assert_array_equal(found.loss_mask, [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(online.best(ROWS, REWARDS, least=1.0).loss_mask, [[1, 1], [0, 0], [0, 0]])
    assert not online.best(ROWS, REWARDS, least=1.5).loss_mask.any()
    cut = dataclasses.replace(ROWS, loss_mask=ROWS.loss_mask * (np.arange(6) != 1)[:, None])
    np.testing.assert_array_equal(online.best(cut, REWARDS).tokens[0], ROWS.tokens[0])


def test_all_samples_that_are_good_enough_are_kept():
    found = online.above(ROWS, REWARDS, least=0.0)
    np.testing.assert_array_equal(found.tokens, ROWS.tokens)
    np.testing.assert_array_equal(found.loss_mask[:, 0], [1, 1, 0, 0, 0, 0])
    assert online.kept(found).value() == 2 / 6


def test_a_pair_is_kept_if_both_of_its_samples_count():
    mask = np.array([[[0, 1], [1, 0]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    assert online.kept(Batch(mask, mask, mask, mask)).value() == pytest.approx(1 / 3)
