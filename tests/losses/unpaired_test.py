import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, scoring, train
from ftjax.types import Batch, Mean, Scores
from tests import toy
from tests.losses.examples import said

METHOD = peft.lora("all-linear", rank=2, init="gaussian")
SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=4)
DESIRABLE = jnp.array([1.0, 0.0])


def batch_of(logps, **fields):
    ints = jnp.zeros(logps.shape, jnp.int32)
    return Batch(ints, jnp.ones(logps.shape), ints, ints + 1, reference_logps=jnp.zeros(logps.shape), **fields)


def baseline(batch, value):
    return losses.with_baseline(batch, Mean(jnp.asarray(value), jnp.ones(())))


def test_kto_by_hand():
    """β = 1, z = 0.5, x = (2, 1): 1 - σ(1.5) = 0.18243 and 2 · (1 - σ(-0.5)) = 1.24492; the mean is 0.71367."""
    scores = Scores(jnp.array([[2.0, 0.0], [0.5, 0.5]]))
    batch = baseline(batch_of(scores.logps, desirable=DESIRABLE), 0.5)
    loss, metrics = said(partial(losses.kto, beta=1.0, undesirable_weight=2.0), scores, batch)
    assert loss.value() == pytest.approx(0.71367, rel=1e-4)
    assert metrics["baseline"].value() == 0.5 and metrics["accuracy"].value() == 0.5
    assert metrics["rewards/desirable"].value() == 2 and metrics["rewards/undesirable"].value() == 1


def test_a_policy_below_its_reference_has_the_baseline_0():
    scores = Scores(jnp.array([[2.0, 0.0], [0.5, 0.5]]))
    batch = batch_of(scores.logps, desirable=DESIRABLE)
    below, zero = (said(losses.kto, scores, baseline(batch, value)) for value in (-3.0, 0.0))
    chex.assert_trees_all_equal(below, zero)
    assert said(losses.apo_zero_unpaired, scores, batch)[0].value() == zero[0].value()


def test_the_baseline_is_a_mean_over_all_mismatched_rows():
    """Log-ratios -1 - 1 = -2 and 0 + 6 = 6 of two micro-batches: z = (−2 + 6) / 2 = 2 in every row; an empty row does not count."""
    logps = jnp.array([[-1.0, -1.0], [0.0, 6.0], [5.0, 5.0]])
    rows = batch_of(logps)
    rows = dataclasses.replace(rows, loss_mask=rows.loss_mask.at[2].set(0))
    parts = (losses.kl_baseline(Scores(logps[part]), jax.tree.map(lambda x, p=part: x[p], rows)) for part in (slice(0, 1), slice(1, 3)))
    batch = losses.with_baseline(rows, sum(parts, Mean(jnp.zeros(()), jnp.zeros(()))))
    np.testing.assert_array_equal(batch.baseline, [2.0, 2.0, 2.0])
    nothing = losses.with_baseline(rows, Mean(jnp.zeros(()), jnp.zeros(())))
    np.testing.assert_array_equal(nothing.baseline, [0.0, 0.0, 0.0])


def test_micro_batches_subtract_the_baseline_of_the_whole_step():
    """A step in micro-batches, whose baseline comes from mismatched rows that lie in the batch."""
    key = jax.random.key(0)
    rows, others = (toy.batch(jax.random.fold_in(key, n), rows=8) for n in range(2))
    frozen, trainable = METHOD.init(key, toy.init(key))
    params = METHOD.attach(frozen, trainable)
    score = jax.jit(SCORE)
    policy = score(params, rows)
    anchor = Scores(policy.logps + 0.1 * jnp.sin(jnp.arange(9.0))[None, :] * rows.loss_mask)
    mismatched = losses.with_reference(others, Scores(score(params, others).logps - 0.02 * others.loss_mask))
    batch = dataclasses.replace(losses.with_reference(rows, anchor), desirable=jnp.arange(8) % 2, mismatched=mismatched)
    batch = losses.with_baseline(batch, losses.kl_baseline(score(params, batch.mismatched), batch.mismatched))
    step = train.make_train_step(SCORE, METHOD, partial(losses.kto, beta=0.5), optax.sgd(1.0), accumulation=4)
    _, metrics = step(train.init_state(key, trainable, METHOD, optax.sgd(1.0)), frozen, batch)
    loss, expected = said(partial(losses.kto, beta=0.5), policy, batch)
    assert metrics["baseline"].value() == pytest.approx(0.02 * 6, rel=1e-4)
    expected = {name: mean.value() for name, mean in {"loss": loss, **expected}.items()}
    assert {name: metrics[name].value() for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_weights_of_the_classes_are_checked():
    assert losses.balance(100, 100) is None and losses.balance(50, 100, desirable_weight=2.5) is None
    assert "between 4 and 5.33" in losses.balance(100, 400)
    assert "needs both" in losses.balance(10, 0)


def test_bco_sums_the_rewards_it_has_seen():
    """β = 1: rewards 2 and 1 at δ = 0, so -log σ(2) - log σ(-1) over 2; then δ = 1.5: -log σ(0.5) - log σ(0.5) over 2."""
    scores = Scores(jnp.array([[2.0, 0.0], [0.5, 0.5]]))
    batch, seen = batch_of(scores.logps, desirable=DESIRABLE), Mean(jnp.zeros(()), jnp.zeros(()))
    expected = [(math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2, math.log1p(math.exp(-0.5))]
    for value in expected:
        loss, metrics = said(partial(losses.bco, beta=1.0), scores, losses.with_baseline(batch, seen))
        seen = seen + metrics["rewards"]
        assert loss.value() == pytest.approx(value, rel=1e-5)
    assert seen.value() == 1.5 and metrics["delta"].value() == 1.5


def test_delta_may_be_the_average_of_the_two_classes():
    """Rewards 2, 4 of desirable and 1 of undesirable responses: the mean of all is 7/3, that of the classes (3 + 1) / 2 = 2."""
    scores = Scores(jnp.array([[2.0], [4.0], [1.0]]))
    batch = batch_of(scores.logps, desirable=jnp.array([1.0, 1.0, 0.0]))
    _, metrics = said(partial(losses.bco, beta=1.0), scores, baseline(batch, 0.0))
    of = lambda name: [metrics[metric] for metric in losses.NEEDS[name].running]  # noqa: E731
    np.testing.assert_allclose(losses.with_baseline(batch, *of("bco")).baseline, 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.with_baseline(batch, *of("bco_balanced")).baseline, 2.0, rtol=1e-6)


def of_step(loss, logps, batch):
    """Value and gradient of what a step goes down."""
    quotient = lambda logps: (lambda mean: mean.total / mean.weight)(loss(Scores(logps), batch)[0])  # noqa: E731
    return jax.jit(jax.value_and_grad(quotient))(logps)


def test_npo_is_gradient_ascent_at_the_reference_and_lets_go_of_what_is_forgotten():
    """d/dx of -(2/β) log σ(-βx) is 2 σ(βx): 1 at x = 0 and 0 far below; a row to keep has the NLL; two means, of two rows and of one."""
    batch = dataclasses.replace(batch_of(jnp.zeros((3, 1))), desirable=jnp.array([0.0, 0.0, 1.0]))
    value, gradient = of_step(partial(losses.npo, retain_coef=0.5), jnp.array([[0.0], [-1000.0], [-4.0]]), batch)
    np.testing.assert_allclose(gradient[:, 0], [1.0 / 2, 0.0, -0.5], atol=1e-6)
    np.testing.assert_allclose(value, 20 * math.log(2) / 2 + 0.5 * 4, rtol=1e-5)


@pytest.mark.parametrize("name", ["npo", "gradient_difference"])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_of_the_two_sets_may_be_empty(name, label):
    """At the reference: gradient ascent on rows to forget alone, gradient descent on rows to keep alone."""
    logps = jnp.array([[-1.0], [-3.0]])
    batch = dataclasses.replace(batch_of(logps, desirable=jnp.full(2, label)), reference_logps=logps)
    value, gradient = of_step(losses.LOSSES[name], logps, batch)
    forgotten = 20 * math.log(2) if name == "npo" else -2.0
    np.testing.assert_allclose(value, 2.0 if label else forgotten, rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 0], [-0.5, -0.5] if label else [0.5, 0.5], rtol=1e-5)


@pytest.mark.parametrize("name", ["npo", "gradient_difference"])
def test_micro_batches_add_up_to_a_mean_over_each_of_the_two_sets(name):
    """Three rows to keep and five to forget, of which micro-batches have as it comes; in NumPy from the scores of the whole."""
    key, keep = jax.random.key(0), np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    rows = dataclasses.replace(toy.batch(key, rows=8), desirable=jnp.asarray(keep, jnp.float32))
    frozen, trainable = METHOD.init(key, toy.init(key))
    logps = jax.jit(SCORE)(METHOD.attach(frozen, trainable), rows).logps
    batch = losses.with_reference(rows, Scores(logps + 0.1 * jnp.sin(jnp.arange(8.0))[:, None] * rows.loss_mask))
    loss = partial(losses.LOSSES[name], retain_coef=0.5)
    share = train.Baseline(lambda params, frozen, batch: losses.desirable_share(batch), losses.with_share)
    states = []
    for parts, baseline in ((1, None), (4, share)):
        step = train.make_train_step(SCORE, METHOD, loss, optax.sgd(1.0), accumulation=parts, baseline=baseline)
        states.append(step(train.init_state(key, jax.tree.map(jnp.copy, trainable), METHOD, optax.sgd(1.0)), frozen, batch))
    (whole, said_whole), (parted, said_parted) = states
    logps, reference = np.asarray(logps, np.float64), np.asarray(batch.reference_logps, np.float64)
    average = logps.sum(-1) / np.asarray(rows.loss_mask).sum(-1)
    forget = 20 * np.log(1 + np.exp(0.1 * (logps - reference).sum(-1))) if name == "npo" else average
    expected = forget[~keep].mean() - 0.5 * average[keep].mean()
    assert [said_whole["loss"].value(), said_parted["loss"].value()] == pytest.approx([expected, expected], rel=1e-5)
    chex.assert_trees_all_close(whole.trainable, parted.trainable, rtol=1e-4, atol=1e-6)


def test_gradient_difference_raises_one_loss_and_lowers_the_other():
    batch = batch_of(jnp.zeros((2, 2)), desirable=DESIRABLE)
    loss, metrics = said(partial(losses.gradient_difference, retain_coef=2.0), Scores(jnp.array([[-1.0, -3.0], [-5.0, -5.0]])), batch)
    assert loss.value() == 2 * 2 - 5 and metrics["nll/keep"].value() == 2 and metrics["nll/forget"].value() == 5


@pytest.mark.parametrize("name", ["kto", "bco", "npo", "gradient_difference"])
def test_missing_labels_and_baselines_are_errors(name):
    logps = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="desirable"):
        losses.LOSSES[name](Scores(logps), baseline(batch_of(logps), 0.0))
    if name in ("kto", "bco"):
        with pytest.raises(ValueError, match="with_baseline"):
            losses.LOSSES[name](Scores(logps), batch_of(logps, desirable=DESIRABLE))
