"""What every objective must keep: a new one joins by a line in EXAMPLES.

All examples are evaluated in one program, so that a test costs no compilation: whole batches in float32 on eight devices, and halves of
them in float64 on one.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, sharding
from ftjax.types import Batch, LossFn, Mean, Scores

B, T = 8, 6
SHAPES = {"rows": (B,), "pairs": (B, 2), "triples": (B, 3)}


class Example(NamedTuple):
    loss: LossFn
    form: str = "pairs"
    reads: str = "logps"
    adds: bool = True  # over micro-batches
    differentiable: bool = True  # no part of the value is taken as constant in the gradient


def pairs(name, *options):
    return examples("pairs", name, *options)


def examples(form, name, *options, **fields):
    return [Example(partial(losses.LOSSES[name], **option), form, **fields) for option in options or ({},)]


EXAMPLES = {
    "sft": examples("rows", "sft", {}, {"label_smoothing": 0.1}),
    "dpo": pairs(
        "dpo", {}, {"label_smoothing": 0.1, "tail_weight": 0.4}, *({"divergence": name} for name in ("forward_kl", "js", "alpha"))
    ),
    "rpo": pairs("rpo"),
    "mpo": pairs("mpo"),
    "wpo": examples("pairs", "wpo", differentiable=False),
    **{name: pairs(name) for name in losses.PAIR_LOSSES if name not in ("sigmoid", "aot", "aot_unpaired")},
    "ipo": pairs("ipo", {}, {"beta": 1e-3}),
    "aot": examples("pairs", "aot", adds=False),
    "aot_unpaired": examples("pairs", "aot_unpaired", adds=False),
    "orpo": pairs("orpo"),
    "cpo": pairs("cpo", {}, {"losses": {"hinge": 1.0}}),
    "simpo": pairs("simpo", {"nll_coef": 0.5, "label_smoothing": 0.1}),
    "alphapo": pairs("alphapo", {}, {"alpha": -0.5}),
    "tpo": examples("triples", "tpo"),
    "tpo_l": examples("triples", "tpo_l"),
    "kto": examples("rows", "kto", {}, {"undesirable_weight": 1.5, "beta": 1.0}),
    "apo_zero_unpaired": examples("rows", "apo_zero_unpaired"),
    "bco": examples("rows", "bco"),
    "reward": examples("pairs", "reward", {"centering_coef": 0.01}, reads="values"),
    "process_reward": examples("rows", "process_reward", reads="values"),
    "npo": examples("rows", "npo"),
    "gradient_difference": examples("rows", "gradient_difference"),
}
NAMED = {f"{name}{n}": example for name, found in EXAMPLES.items() for n, example in enumerate(found)}
every_loss = pytest.mark.parametrize("name", NAMED)


def test_every_loss_is_listed():
    assert set(EXAMPLES) == set(losses.LOSSES)


def make_problem(shape, dtype=np.float32):
    """Random scores of responses after a prompt of one token or more; the last row only fills the batch."""
    rng = np.random.default_rng(len(shape))
    starts, ends = rng.integers(1, 3, (*shape, 1)), rng.integers(3, T + 1, (*shape, 1))
    ends[-1] = 0
    mask = (np.arange(T) >= starts) & (np.arange(T) < ends)
    real = lambda low, high, shape=(*shape, T): rng.uniform(low, high, shape)  # noqa: E731
    ints = np.broadcast_to(np.arange(T), mask.shape)
    said = {"logps": real(-2, -0.1), "entropy": real(0, 1), "mean_logps": real(-4, -3), "greedy": real(0, 1) > 0.5}
    scores = Scores(**{name: x * mask for name, x in said.items()}, log_collision=real(-2, 0) * mask, values=real(-1, 1))
    batch = Batch(
        ints,
        mask,
        ints,
        (np.arange(T) < ends).astype(ints.dtype),
        reference_logps=real(-2, -0.1) * mask,
        desirable=np.arange(B) % 2 > 0,
        baseline=np.full(B, 0.3),
        density_ratios=real(0.1, 2, B),
        margins=real(0, 1, B),
        labels=real(0, 1) > 0.5,
    )
    return jax.tree.map(lambda x: np.asarray(x, np.int32 if x.dtype == ints.dtype else dtype), (scores, batch))


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
def evaluate(problems):
    """Return loss, metrics and gradient of every example."""
    found = {}
    for name, (loss, form, reads, *_) in NAMED.items():
        scores, batch = problems[form]

        def total(x, loss=loss, scores=scores, batch=batch, reads=reads):
            mean, metrics = loss(dataclasses.replace(scores, **{reads: x}), batch)
            return mean.total, (mean, metrics)

        gradient, (mean, metrics) = jax.grad(total, has_aux=True)(getattr(scores, reads))
        found[name] = mean, metrics, gradient
    return found


def changed(problems, change):
    """Return the problems with what `change(scores, batch)` says of each."""
    return {form: change(*problem) for form, problem in problems.items()}


def with_scores(problems, make):
    """Return the problems with `make(x, batch)` in the place of what the losses differentiate."""
    reads = {example.reads for example in NAMED.values()}
    return changed(
        problems, lambda scores, batch: (dataclasses.replace(scores, **{f: make(getattr(scores, f), batch) for f in reads}), batch)
    )


def halves_of(problems):
    return [jax.tree.map(lambda x, h=h: x[h * B // 2 : (h + 1) * B // 2], problems) for h in range(2)]


def on_mesh(problems):
    """Lay the rows over eight devices, one each."""
    mesh = sharding.make_mesh(data=8)
    return jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(mesh, ndim=x.ndim, time=False)), problems)


@pytest.fixture(scope="module")
def problems():
    return {form: make_problem(shape) for form, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def whole(problems):
    return jax.device_get(evaluate(on_mesh(problems)))


@pytest.fixture(scope="module")
def variants(problems):
    emptied = lambda scores, batch: (  # noqa: E731
        scores,
        dataclasses.replace(batch, loss_mask=0 * batch.loss_mask, segment_ids=0 * batch.segment_ids),
    )
    side = lambda x: -1e4 * (np.indices(x.shape)[-2] % 2).astype("f")  # noqa: E731
    made = {
        "noise": with_scores(problems, lambda x, batch: np.where(batch.loss_mask > 0, x, -np.float32(1e4))),
        "low": with_scores(problems, lambda x, _: np.full_like(x, -1e4)),
        "one side low": with_scores(problems, lambda x, _: side(x)),
        "other side low": with_scores(problems, lambda x, _: -1e4 - side(x)),
        "certain": with_scores(problems, lambda x, _: np.zeros_like(x)),
        "like the reference": with_scores(problems, lambda x, batch: batch.reference_logps),
        "empty": changed(problems, emptied),
        "turned": jax.tree.map(lambda x: x[::-1].copy(), problems),
    }
    return {name: jax.device_get(evaluate(on_mesh(variant))) for name, variant in made.items()}


@pytest.fixture(scope="module")
def halves():
    """What the halves of the same problems say, in float64 on one device."""
    with jax.enable_x64(True):
        return [
            jax.device_get(evaluate(half)) for half in halves_of({form: make_problem(shape, np.float64) for form, shape in SHAPES.items()})
        ]


@pytest.fixture(scope="module")
def slopes(halves):
    """Of the first half in float64: the gradients along random directions, and the differences of the loss there."""
    with jax.enable_x64(True):
        problems = halves_of({form: make_problem(shape, np.float64) for form, shape in SHAPES.items()})[0]
        rng = np.random.default_rng(0)
        directions = {form: rng.normal(size=scores.logps.shape) for form, (scores, _) in problems.items()}

        def moved(size):
            along = {form: {form: problem} for form, problem in problems.items()}
            parts = (with_scores(part, lambda x, _, form=form: x + size * directions[form]) for form, part in along.items())
            return jax.device_get(evaluate({form: problem for part in parts for form, problem in part.items()}))

        ahead, behind = moved(1e-6), moved(-1e-6)
    slope = {name: float(np.sum(halves[0][name][2] * directions[example.form])) for name, example in NAMED.items()}
    return {name: (slope[name], float(ahead[name][0].total - behind[name][0].total) / 2e-6) for name in NAMED}


@every_loss
def test_values_are_means_that_add_over_micro_batches_and_devices(name, whole, halves):
    mean, metrics, gradient = whole[name]
    assert isinstance(mean, Mean) and all(isinstance(value, Mean) for value in metrics.values())
    if NAMED[name].adds:
        chex.assert_trees_all_close(jax.tree.map(jnp.add, *(half[name][:2] for half in halves)), (mean, metrics), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([half[name][2] for half in halves]), gradient, rtol=1e-5, atol=1e-6)


@every_loss
def test_masked_tokens_change_neither_value_nor_gradient(name, problems, whole, variants):
    got, mask = variants["noise"][name], problems[NAMED[name].form][1].loss_mask
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


@every_loss
def test_a_batch_without_tokens_has_no_loss(name, variants):
    mean, _, gradient = variants["empty"][name]
    assert mean.total == 0 and mean.weight == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("name", [name for name, example in NAMED.items() if example.differentiable])
def test_the_gradient_is_that_of_finite_differences(name, slopes):
    np.testing.assert_allclose(*slopes[name], rtol=1e-6, atol=1e-8)
