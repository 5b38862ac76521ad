"""Every sample is learnt from once an epoch, and told in a row that can be read."""

import dataclasses
import json

import numpy as np
import pytest

from ftjax import data, online, rollout
from ftjax.types import Batch

ROWS = Batch(np.arange(24).reshape(12, 2), *[np.zeros((12, 2))] * 3, advantages=np.arange(12.0))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_epoch_learns_from_each_row_once_in_an_order_of_its_own(count):
    epochs = []
    for epoch in range(2):
        parts = [online.minibatch(ROWS, seed=1, index=3, step=epoch * count + at, count=count) for at in range(count)]
        assert all(part.tokens.shape == (12 // count, 2) and (part.tokens[:, 0] == 2 * part.advantages).all() for part in parts)
        epochs.append(np.concatenate([part.advantages for part in parts]))
        np.testing.assert_array_equal(np.sort(epochs[-1]), np.arange(12.0))
    assert count == 1 or (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("count", [1, 2])
def test_at_the_first_step_alone_the_policy_is_asked_what_it_said(count):
    batch = dataclasses.replace(ROWS, old_logps=ROWS.tokens.astype(np.float32))
    parts = [online.minibatch(batch, seed=1, index=3, step=step, count=count) for step in range(3)]
    assert np.isnan(parts[0].old_logps).all() and not np.isnan(batch.old_logps).any()
    assert all((part.old_logps == part.tokens).all() for part in parts[1:])


def test_rewards_are_bounded_and_samples_that_were_cut_pay():
    samples = [rollout.Sample(*[np.zeros(2)] * 3, reason) for reason in ("eos", "length", "stop", "length")]
    rewards = np.array([[30.0, 1.0], [np.nan, -20.0]], np.float32)
    found = online.shaped(rewards, samples, bounds=(-10.0, 10.0), unfinished_penalty=2.0)
    np.testing.assert_array_equal(found, [[10, -1], [np.nan, -12]])
    np.testing.assert_array_equal(online.shaped(rewards, samples), rewards)


def test_groups_that_teach_nothing_make_room_for_others_that_do():
    def experience(name: str, rewards: list[list[float]]) -> online.Experience:
        rewards = np.array(rewards)
        asked = [data.Prompt(np.arange(2), data.Example(({"role": "user", "content": f"{name}{i}"},))) for i in range(len(rewards))]
        samples = [rollout.Sample(*[np.arange(n)] * 3, "eos") for n in range(rewards.size)]
        texts = [f"{name}{i}.{j}" for i in range(len(rewards)) for j in range(2)]
        return online.Experience(asked, samples, texts, rewards, {"right": rewards}, 0 * rewards, 1.0)

    found = experience("a", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [np.nan, 1.0]])
    assert online.informative(found.rewards).tolist() == [False, True, False, False]
    more = experience("b", [[2.0, 2.0], [0.0, 3.0], [4.0, 0.0]])
    filled = online.filled(found, more)
    assert [prompt.text for prompt in filled.prompts] == ["b1", "a1", "b2", "a3"]
    assert filled.texts == ["b1.0", "b1.1", "a1.0", "a1.1", "b2.0", "b2.1", "a3.0", "a3.1"] and filled.seconds == 2.0
    np.testing.assert_array_equal(filled.each["right"], [[0, 3], [0, 1], [4, 0], [np.nan, 1]])
    assert [len(sample.tokens) for sample in filled.samples] == [2, 3, 2, 3, 4, 5, 6, 7]


def test_a_pair_is_the_best_and_the_worst_of_a_prompt_if_they_differ():
    mask = np.ones((12, 2), np.float32)
    rewards = np.array([[0.0, 2.0, 1.0, -1.0], [1.0, np.nan, 1.0, 1.0], [np.nan, 3.0, np.nan, np.nan]])
    found = online.pairs(dataclasses.replace(ROWS, loss_mask=mask), rewards)
    assert found.tokens.shape == (3, 2, 2) and found.advantages is None
    np.testing.assert_array_equal(found.tokens[0], ROWS.tokens[[1, 3]])
    np.testing.assert_array_equal(found.loss_mask[:, :, 0], [[1, 1], [0, 0], [0, 0]])


def test_a_sample_that_was_cut_is_neither_the_best_nor_the_worst_of_a_prompt():
    """Of samples 1, 3, 4 and 9 no token counts: of the second prompt one sample is left, of the others the next best and next worst."""
    mask = np.ones((12, 2), np.float32) * ~np.isin(np.arange(12), [1, 3, 4, 5, 6, 9])[:, None]
    rewards = np.array([[0.0, 2.0, 1.0, -1.0], [1.0, 2.0, 3.0, 4.0], [5.0, 9.0, 6.0, 7.0]])
    found = online.pairs(dataclasses.replace(ROWS, loss_mask=mask), rewards)
    np.testing.assert_array_equal(found.tokens[[0, 2]], ROWS.tokens[[[2, 0], [11, 8]]])
    np.testing.assert_array_equal(found.loss_mask[:, :, 0], [[1, 1], [0, 0], [1, 1]])
    assert online.kept(found).value() == pytest.approx(2 / 3)


def test_the_advantage_of_a_sample_whose_tokens_have_their_own_is_their_mean():
    """Not one over the row, in which a prompt and padding stand too; what an episode was told has none."""
    example = data.Example(({"role": "user", "content": "2 + 3 ="},))
    told = rollout.Episode(np.array([True, False, True]), (), None)
    samples = [rollout.Sample(np.arange(n), np.zeros(n), np.zeros(n), "eos", told if n == 3 else None) for n in (2, 3, 1)]
    advantages = np.array([[[0, 0, 0, 0.5, 1.5, 0], [0, 0, 0, 3.0, 0, 1.0], [0, 0, 0, 0, 0, 0]]])
    found = online.Experience([data.Prompt(np.arange(3), example)], samples, [""] * 3, np.zeros((1, 3)), {}, advantages, 1.0)
    assert [row["advantage"] for row in online.table(found)] == [1.0, 2.0, 0.0]


def test_the_table_is_plain_data_with_each_reward_beside_its_sample():
    example = data.Example(({"role": "user", "content": "2 + 3 ="},))
    samples = [rollout.Sample(np.arange(n), np.zeros(n), np.zeros(n), "eos" if n < 3 else "length") for n in (2, 3)]
    rewards, none = np.array([[1.0, np.nan]]), np.array([[0.5, np.nan]])
    found = online.Experience(
        [data.Prompt(np.arange(4), example)], samples, ["5", "6"], rewards, {"right": none}, np.array([[0.7, 0.0]]), 1.0
    )
    first, second = json.loads(json.dumps(online.table(found)))
    assert first == {
        "prompt": "2 + 3 =",
        "completion": "5",
        "rewards": {"right": 0.5},
        "reward": 1.0,
        "advantage": 0.7,
        "length": 2,
        "finished": True,
    }
    assert second["reward"] is None and second["rewards"] == {"right": None} and not second["finished"]
