"""Judged responses that share a row are what they are in rows of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, scoring
from ftjax.data.corpus import Sequences
from ftjax.data.judged_batch import common
from ftjax.data.loader import make_loader
from ftjax.types import BRANCH, Mean
from tests import toy

SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=8)
METHOD = peft.chain(peft.lora("all-linear", rank=2, init="gaussian"), peft.value_head())


def loader(packing, responses, items=11, *, batch_size, steps=False):
    """Items of random prompts and responses, so that some rows hold several and some one; with `steps` each ends in a step, some in two."""
    draw, tokens, masks, starts = np.random.default_rng(0), [], [], [0]
    for _ in range(items):
        prompt = draw.integers(0, toy.VOCAB, draw.integers(1, 5))
        for _ in range(responses):
            answer = draw.integers(0, toy.VOCAB, draw.integers(1, 6))
            tokens += [prompt, answer]
            masks += [np.zeros(len(prompt), np.uint8), np.ones(len(answer), np.uint8)]
            starts.append(starts[-1] + len(prompt) + len(answer))
    sequences = Sequences(np.concatenate(tokens).astype(np.int32), np.concatenate(masks), np.array(starts))
    margins, labels, ratios = draw.random(items), np.arange(items) % 2, draw.uniform(0.6, 3, items)
    numbers = {1: {"desirable": labels, "density_ratios": ratios}, 2: {"margins": margins}, 3: {}}[responses]
    numbers = {name: values.astype(np.float32) for name, values in numbers.items()}
    if steps:
        ends = (np.diff(sequences.loss_mask, append=np.uint8(0)) == 255) | (sequences.loss_mask & (sequences.tokens % 3 == 0))
        labels = {"labels": (ends * draw.random(len(ends))).astype(np.float32)}
        sequences, numbers = sequences._replace(loss_mask=ends.astype(np.uint8), known=labels), {}
    options = {"packing": packing, "responses": responses, "numbers": numbers, "buckets": 1}
    return make_loader(sequences, batch_size=batch_size, max_tokens=12, **options)


SINGLE = [("apo_zero_unpaired", 1), ("bco", 1), ("npo", 1), ("gradient_difference", 1), ("process_reward", 1)]
CASES = [("dpo", 2), ("wpo", 2), ("ipo", 2), ("reward", 2), ("orpo", 2), *SINGLE]
SHARED = [("dpo", 2), ("wpo", 2), ("reward", 2), ("tpo", 3), ("apo_zero_unpaired", 1)]


@pytest.mark.parametrize(
    ("name", "responses", "packing"), [*((*case, "best_fit") for case in CASES), *((*case, "shared") for case in SHARED)]
)
def test_packed_equals_unpacked_in_value_and_gradient(name, responses, packing, key):
    frozen, trainable = METHOD.init(key, toy.init(key))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    needs = losses.NEEDS[name]
    steps = needs.data == "steps"  # tokens are judged and no responses, so nothing has to be taken apart

    @partial(jax.jit, static_argnums=0)
    def summed(packed, batch):
        loss = losses.unpacked(losses.LOSSES[name]) if packed and not steps else losses.LOSSES[name]
        batch = losses.with_baseline(batch, Mean(jnp.float32(0.6), jnp.float32(2)))
        batch = losses.with_share(batch, Mean(jnp.float32(5), jnp.float32(11)))  # of all items, however they are split
        batch = losses.with_reference(batch, SCORE(frozen, batch, outputs=("logps",)))

        def total(trainable):
            mean, metrics = loss(SCORE(METHOD.attach(frozen, trainable), batch, outputs=needs.outputs), batch)
            return mean.total, (mean, metrics)

        return jax.grad(total, has_aux=True)(trainable)

    results = []
    for kind, rows in (("none", 4), (packing, 2)):
        found = loader(kind, responses, batch_size=rows, steps=steps)
        batches = [jax.tree.map(jnp.asarray, batch) for batch in found.epoch()]
        assert len({batch.tokens.shape for batch in batches}) == 1
        if kind == packing:
            held = (batch.segment_ids if steps else (batch.places[:, :, 0] >= 0).any(-1).cumsum(-1) for batch in batches)
            in_a_row = np.concatenate([np.max(items, -1) for items in held])
            assert in_a_row.max() > 1 and in_a_row.sum() == 11
        results.append(jax.tree.map(lambda *xs: sum(xs), *(summed(kind == packing, batch) for batch in batches)))
    (gradient, (mean, metrics)), (other, (packed, described)) = results
    assert packed.value() == pytest.approx(mean.value(), rel=1e-5) and float(packed.weight) == (float(mean.weight) if steps else 11)
    assert {key: mean.value() for key, mean in described.items()} == pytest.approx(
        {key: mean.value() for key, mean in metrics.items()}, rel=1e-4, abs=1e-6
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-3
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6 * max(1.0, float(jnp.abs(two).max())))


def test_responses_share_their_prompt_and_nothing_else():
    """By hand: prompt 5 6 7 with responses 1 2 and 3, prompt 8 with 4 and 4 4; the prompt's last token stands before each response."""
    tokens, mask = [5, 6, 7, 1, 2, 5, 6, 7, 3, 8, 4, 8, 4, 4], [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1]
    sequences = Sequences(np.array(tokens, np.int32), np.array(mask, np.uint8), np.array([0, 5, 9, 11, 14]))
    found = make_loader(sequences, batch_size=1, max_tokens=7, packing="shared", responses=2, shuffle=False)
    batch, b = found.batch(0), BRANCH
    assert found.steps_per_epoch == 1
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 2, 7, 3, 8, 4, 8, 4, 4, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 2, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, *[1 + b] * 3, *[1 + 2 * b] * 2, *[2 + b] * 2, *[2 + 2 * b] * 3, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0]]
    assert batch.places.tolist() == [[[[3, 4], [6, -1]], [[8, -1], [10, 11]]]]


def test_rows_in_which_no_two_items_fit_are_as_wide_as_the_longest():
    tokens, mask = [*range(40)] * 2, ([0] * 30 + [1] * 10) * 2
    sequences = Sequences(np.array(tokens, np.int32), np.array(mask, np.uint8), np.array([0, 40, 80]))
    widths = {
        packing: make_loader(sequences, batch_size=1, max_tokens=40, packing=packing, responses=2).batch(0).tokens.shape[1]
        for packing in ("best_fit", "shared")
    }
    assert widths == {"best_fit": 80, "shared": 64}  # 29 + 2 · 11 tokens


def test_a_stem_ends_where_prompts_differ():
    """Responses whose prompts were rendered in different ways share what is the same."""
    tokens, mask = [5, 6, 7, 1, 5, 9, 7, 3], [0, 0, 0, 1, 0, 0, 0, 1]
    sequences = Sequences(np.array(tokens, np.int32), np.array(mask, np.uint8), np.array([0, 4, 8]))
    assert common(sequences, 2).tolist() == [1]


def test_a_batch_that_is_not_packed_is_named(key):
    batch = toy.batch(key)
    with pytest.raises(ValueError, match="batch.places is missing"):
        losses.unpacked(losses.dpo)(SCORE(toy.init(key), batch), batch)


def test_what_needs_its_neighbours_is_not_packed():
    with pytest.raises(ValueError, match="packing is 'wrapped'; judged responses take 'none'"):
        loader("wrapped", 2, batch_size=2)
