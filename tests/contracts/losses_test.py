"""What every objective must keep: a new one joins by a line in `tests.losses.examples`.

Whole batches are evaluated in float32 on eight devices, and halves of them in float64 on one.
"""

import dataclasses
from functools import partial

import chex
import jax
import numpy as np
import pytest

from ftjax import losses, sharding
from ftjax.types import Mean
from tests.losses.examples import EXAMPLES, NAMED, evaluate, evaluate64, halves_of, make_problem, make_problems

every_loss = pytest.mark.parametrize("name", NAMED)


def test_every_loss_is_listed():
    assert set(EXAMPLES) == set(losses.LOSSES)


def changed(problems, change):
    """Return the problems with what `change(scores, batch)` says of each."""
    return {form: change(*problem) for form, problem in problems.items()}


def with_scores(problems, make):
    """Return the problems with `make(x, batch)` in the place of what the losses differentiate; the batch's mask says where they read it."""
    reads = {example.reads for example in NAMED.values()}

    def remade(form, scores, batch):
        fields = {f: make(getattr(scores, f), dataclasses.replace(batch, loss_mask=read_mask(form, f, batch))) for f in reads}
        return dataclasses.replace(scores, **fields), batch

    return {form: remade(form, *problem) for form, problem in problems.items()}


def read_mask(form, field, batch):
    """Return where a loss reads a field: of rollouts the value before each token that counts, else what is said of that token."""
    ahead = form == "rollouts" and field == "values"
    return np.roll(batch.loss_mask, -1, axis=-1) if ahead else batch.loss_mask


def emptied_of(scores, batch, part):
    """Return the pairs or triples without the tokens of a part of them; other problems as they are."""
    if batch.loss_mask.ndim < 3:
        return scores, batch
    mask, segments = batch.loss_mask.copy(), batch.segment_ids.copy()
    mask[part] = segments[part] = 0
    return scores, dataclasses.replace(batch, loss_mask=mask, segment_ids=segments)


def on_mesh(problems):
    """Lay the rows over eight devices, one each."""
    mesh = sharding.make_mesh(data=8)
    return jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(mesh, ndim=x.ndim, time=False)), problems)


@pytest.fixture(scope="module")
def problems():
    return make_problems()


@pytest.fixture(scope="module")
def whole(problems):
    return evaluate(on_mesh(problems))


@pytest.fixture(scope="module")
def variants(problems):
    emptied = lambda scores, batch: (  # noqa: E731
        scores,
        dataclasses.replace(batch, loss_mask=0 * batch.loss_mask, segment_ids=0 * batch.segment_ids),
    )
    without = lambda part: changed(problems, partial(emptied_of, part=part))  # noqa: E731
    side = lambda x: -1e4 * (np.indices(x.shape)[-2] % 2).astype("f")  # noqa: E731
    made = {
        "noise": with_scores(problems, lambda x, batch: np.where(batch.loss_mask > 0, x, -np.float32(1e4))),
        "low": with_scores(problems, lambda x, _: np.full_like(x, -1e4)),
        "one side low": with_scores(problems, lambda x, _: side(x)),
        "other side low": with_scores(problems, lambda x, _: -1e4 - side(x)),
        "certain": with_scores(problems, lambda x, _: np.zeros_like(x)),
        "like the reference": with_scores(problems, lambda x, batch: batch.reference_logps),
        "empty": changed(problems, emptied),
        "without a chosen response": without(np.s_[0, 0]),
        "without a rejected response": without(np.s_[0, 1]),
        "without a pair": without(np.s_[0]),
        "turned": jax.tree.map(lambda x: x[::-1].copy(), problems),
    }
    return {name: evaluate(on_mesh(variant)) for name, variant in made.items()}


@pytest.fixture(scope="module")
def halves():
    """What the halves of the same problems say, in float64 on one device."""
    return [evaluate64(half) for half in halves_of(make_problems(np.float64))]


@pytest.fixture(scope="module")
def slopes(halves):
    """Of the first half in float64: the gradients along random directions, and the differences of the loss there."""
    problems = halves_of(make_problems(np.float64))[0]
    rng = np.random.default_rng(0)
    directions = {form: rng.normal(size=scores.logps.shape) for form, (scores, _) in problems.items()}

    def moved(field, size):
        add = lambda form, scores: dataclasses.replace(scores, **{field: getattr(scores, field) + size * directions[form]})  # noqa: E731
        return evaluate64({form: (add(form, scores), batch) for form, (scores, batch) in problems.items()})

    sides = {field: (moved(field, 1e-6), moved(field, -1e-6)) for field in {example.reads for example in NAMED.values()}}
    found = {}
    for name, example in NAMED.items():
        ahead, behind = (float(side[name][0].total) for side in sides[example.reads])
        found[name] = float(np.sum(halves[0][name][2] * directions[example.form])), (ahead - behind) / 2e-6
    return found


@every_loss
def test_values_are_means_that_add_over_micro_batches_and_devices(name, whole, halves):
    mean, metrics, gradient = whole[name]
    assert isinstance(mean, Mean) and all(isinstance(value, Mean) for value in metrics.values())
    if NAMED[name].adds:
        chex.assert_trees_all_close(jax.tree.map(np.add, *(half[name][:2] for half in halves)), (mean, metrics), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([half[name][2] for half in halves]), gradient, rtol=1e-5, atol=1e-6)


@every_loss
def test_masked_tokens_change_neither_value_nor_gradient(name, problems, whole, variants):
    got, mask = variants["noise"][name], read_mask(NAMED[name].form, NAMED[name].reads, problems[NAMED[name].form][1])
    chex.assert_trees_all_equal(got, whole[name])
    assert np.abs(got[2]).max() > 0
    assert np.abs(got[2] * (1 - mask)).max() == 0


@every_loss
def test_the_order_of_the_rows_does_not_matter(name, whole, variants):
    (mean, metrics, gradient), turned = whole[name], variants["turned"][name]
    chex.assert_trees_all_close(turned[:2], (mean, metrics), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned[2], gradient[::-1], rtol=1e-5, atol=1e-6)


@every_loss
def test_extreme_log_probabilities_stay_finite(name, variants):
    assert not [variant for variant, found in variants.items() if not all(np.isfinite(x).all() for x in jax.tree.leaves(found[name]))]


@pytest.mark.parametrize("name", [name for name, example in NAMED.items() if example.form in ("pairs", "triples")])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_with_an_empty_response_counts_nowhere(name, side, variants):
    """In value, metrics and gradient it is as if the whole pair were not there."""
    chex.assert_trees_all_equal(variants[f"without a {side} response"][name], variants["without a pair"][name])


@pytest.mark.parametrize("name", [name for name, example in NAMED.items() if not example.adds])
def test_rows_that_are_compared_with_each_other_are_so_over_eight_devices(name, whole):
    """What does not add is the same on one device, in float64."""
    example = NAMED[name]

    def total(scores, batch):
        mean, metrics = example.loss(scores, batch)
        return mean.total, (mean, metrics)

    with jax.enable_x64(True):
        gradient, said = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(*make_problem(example.form, np.float64)))
    chex.assert_trees_all_close(whole[name][:2], said, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole[name][2], getattr(gradient, example.reads), rtol=1e-5, atol=1e-6)


@every_loss
def test_a_batch_without_tokens_has_no_loss(name, variants):
    mean, _, gradient = variants["empty"][name]
    assert mean.total == 0 and mean.weight == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("name", [name for name, example in NAMED.items() if example.differentiable])
def test_the_gradient_is_that_of_finite_differences(name, slopes):
    np.testing.assert_allclose(*slopes[name], rtol=1e-6, atol=1e-8)
