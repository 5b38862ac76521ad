"""Samples that share a row with their prompt are what they are in rows of their own."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, online, peft, scoring
from ftjax.types import BRANCH, Batch
from tests import toy

SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=8)
METHOD = peft.chain(peft.lora("all-linear", rank=2, init="gaussian"), peft.value_head())


def rollouts(**fields) -> Batch:
    """Three prompts with two samples each; the second sample of the first prompt was cut and counts nowhere."""
    draw = np.random.default_rng(0)
    tokens, mask, ids = np.zeros((6, 12), np.int32), np.zeros((6, 12), np.float32), np.zeros((6, 12), np.int32)
    for prompt, (size, lengths) in enumerate(((5, (3, 6)), (1, (2, 4)), (4, (1, 3)))):
        asked = draw.integers(0, toy.VOCAB, size)
        for sample, length in enumerate(lengths):
            row = 2 * prompt + sample
            tokens[row, : size + length] = [*asked, *draw.integers(0, toy.VOCAB, length)]
            mask[row, size : size + length], ids[row, : size + length] = row != 1, 1
    positions = np.where(ids > 0, np.arange(12), 0).astype(np.int32)
    numbers = {
        name: draw.normal(size=(6, 12)).astype(np.float32) * mask - 1 for name in ("behavior_logps", "old_logps", "old_values", "returns")
    }
    advantages = {"advantages": draw.normal(size=6).astype(np.float32)}
    return dataclasses.replace(Batch(tokens, mask, positions, ids), **numbers | advantages | fields)


@pytest.mark.parametrize(("name", "turns"), [("grpo", False), ("grpo", True), ("gspo", False), ("ppo", False), ("ppo", True)])
def test_value_and_gradient_are_those_of_rows_of_their_own(name, turns, key):
    frozen, trainable = METHOD.init(key, toy.init(key))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    batch = rollouts()
    if turns:  # between which the policy was told something
        batch.loss_mask[3, 2:4] = batch.loss_mask[5, 5] = 0
    if name == "ppo":
        batch = dataclasses.replace(batch, advantages=np.where(batch.loss_mask > 0, batch.advantages[:, None], 0))
    shared = online.together(batch, 2)
    assert shared.tokens.shape[0] == 3 and shared.places.shape[:3] == (3, 2, 1)

    def total(trainable, batch, loss):
        mean, metrics = loss(SCORE(METHOD.attach(frozen, trainable), batch, outputs=("logps", "entropy", "values")), batch)
        return mean.total, (mean, metrics)

    found = [
        jax.jit(jax.grad(partial(total, loss=loss), has_aux=True))(trainable, jax.tree.map(jnp.asarray, rows))
        for loss, rows in ((losses.LOSSES[name], batch), (losses.unpacked(losses.LOSSES[name]), shared))
    ]
    (gradient, (mean, metrics)), (other, (packed, described)) = found
    assert packed.value() == pytest.approx(mean.value(), rel=1e-5) and float(packed.weight) == float(mean.weight)
    assert {key: one.value() for key, one in described.items()} == pytest.approx(
        {key: one.value() for key, one in metrics.items()}, rel=1e-4, abs=1e-6
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-3
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_a_prompt_stands_once_but_for_its_last_token():
    """By hand: prompt 5 6 7 with the samples 1 2 and 3."""
    tokens, mask = np.array([[5, 6, 7, 1, 2], [5, 6, 7, 3, 0]], np.int32), np.array([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]], np.float32)
    ids = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.int32)
    batch = Batch(tokens, mask, np.arange(5)[None] * ids, ids, advantages=np.array([1.0, -1.0]), old_logps=-mask)
    found, b = online.together(batch, 2), BRANCH
    assert found.tokens[0, :8].tolist() == [5, 6, 7, 1, 2, 7, 3, 0] and not found.tokens[0, 8:].any()
    assert found.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 2, 3, 0]
    assert found.segment_ids[0, :8].tolist() == [1, 1, 1 + b, 1 + b, 1 + b, 1 + 2 * b, 1 + 2 * b, 0]
    assert found.loss_mask[0, :8].tolist() == (-found.old_logps[0, :8]).tolist() == [0, 0, 0, 1, 1, 0, 1, 0]
    assert found.places.tolist() == [[[[2, 3, 4, -1, -1]], [[5, 6, -1, -1, -1]]]] and found.advantages.tolist() == [[1, -1]]


def test_half_a_group_is_refused():
    with pytest.raises(ValueError, match="6 rows are no whole number of groups of 4"):
        online.together(rollouts(), 4)
