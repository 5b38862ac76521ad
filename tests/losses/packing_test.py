"""Judged responses that share a row are what they are in rows of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, scoring
from ftjax.data.corpus import Sequences
from ftjax.data.loader import make_loader
from tests import toy

SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=8)
METHOD = peft.chain(peft.lora("all-linear", rank=2, init="gaussian"), peft.value_head())


def loader(packing, responses, items=11, *, batch_size):
    """Items of random prompts and responses, so that some rows hold several and some one."""
    draw, tokens, masks, starts = np.random.default_rng(0), [], [], [0]
    for _ in range(items):
        prompt = draw.integers(0, toy.VOCAB, draw.integers(1, 5))
        for _ in range(responses):
            answer = draw.integers(0, toy.VOCAB, draw.integers(1, 6))
            tokens += [prompt, answer]
            masks += [np.zeros(len(prompt), np.uint8), np.ones(len(answer), np.uint8)]
            starts.append(starts[-1] + len(prompt) + len(answer))
    sequences = Sequences(np.concatenate(tokens).astype(np.int32), np.concatenate(masks), np.array(starts))
    numbers = (
        {"margins": draw.random(items).astype(np.float32)} if responses == 2 else {"desirable": np.arange(items, dtype=np.float32) % 2}
    )
    options = {"packing": packing, "responses": responses, "numbers": numbers, "buckets": 1}
    return make_loader(sequences, batch_size=batch_size, max_tokens=12, **options)


@pytest.mark.parametrize(("name", "responses"), [("dpo", 2), ("ipo", 2), ("reward", 2), ("orpo", 2), ("apo_zero_unpaired", 1)])
def test_packed_equals_unpacked_in_value_and_gradient(name, responses, key):
    frozen, trainable = METHOD.init(key, toy.init(key))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    outputs = ("logps", "values") if name == "reward" else ("logps",)

    @partial(jax.jit, static_argnums=0)
    def summed(packed, batch):
        loss = losses.unpacked(losses.LOSSES[name]) if packed else losses.LOSSES[name]
        batch = losses.with_reference(batch, SCORE(frozen, batch, outputs=("logps",)))

        def total(trainable):
            mean, metrics = loss(SCORE(METHOD.attach(frozen, trainable), batch, outputs=outputs), batch)
            return mean.total, (mean, metrics)

        return jax.grad(total, has_aux=True)(trainable)

    results = []
    for packing, rows in (("none", 4), ("best_fit", 2)):
        found = loader(packing, responses, batch_size=rows)
        batches = [jax.tree.map(jnp.asarray, batch) for batch in found.epoch()]
        assert len({batch.tokens.shape for batch in batches}) == 1
        if packing == "best_fit":
            in_a_row = np.concatenate([(batch.places[:, :, 0] >= 0).any(-1).sum(-1) for batch in batches])
            assert in_a_row.max() > 1 and in_a_row.sum() == 11
        results.append(jax.tree.map(lambda *xs: sum(xs), *(summed(packing == "best_fit", batch) for batch in batches)))
    (gradient, (mean, metrics)), (other, (packed, described)) = results
    assert packed.value() == pytest.approx(mean.value(), rel=1e-5) and float(packed.weight) == 11
    assert {key: mean.value() for key, mean in described.items()} == pytest.approx(
        {key: mean.value() for key, mean in metrics.items()}, rel=1e-4, abs=1e-6
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-3
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_a_batch_that_is_not_packed_is_named(key):
    batch = toy.batch(key)
    with pytest.raises(ValueError, match="batch.places is missing"):
        losses.unpacked(losses.dpo)(SCORE(toy.init(key), batch), batch)


def test_what_needs_its_neighbours_is_not_packed():
    with pytest.raises(ValueError, match="packing is 'wrapped'; judged responses take 'none'"):
        loader("wrapped", 2, batch_size=2)
