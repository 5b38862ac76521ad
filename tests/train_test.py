import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, optimizers, peft, scoring, sharding, train
from ftjax.types import Batch, Mean
from tests import toy

SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=4)
METHOD = peft.chain(peft.lora("all-linear", rank=2, init="gaussian"), peft.full("norm/scale"))


def start(key, method=METHOD, optimizer=None, **options):
    optimizer = optimizer or optimizers.build("adamw", learning_rate=0.05, steps=10)
    frozen, trainable = method.init(key, toy.init(key))
    return (
        train.make_train_step(SCORE, method, losses.sft, optimizer, **options),
        train.init_state(key, trainable, method, optimizer),
        frozen,
    )


def values(metrics):
    return {name: mean.value() for name, mean in metrics.items()}


def test_the_gradient_is_that_of_the_loss_by_finite_differences(key):
    batch = toy.batch(key)
    frozen, trainable = METHOD.init(key, toy.init(key))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)

    @jax.jit
    def loss(trainable):
        mean, _ = losses.sft(SCORE(METHOD.attach(frozen, trainable), batch), batch)
        return mean.total / mean.weight

    step = train.make_train_step(SCORE, METHOD, losses.sft, optax.sgd(1.0))
    new, _ = step(train.init_state(key, jax.tree.map(jnp.copy, trainable), METHOD, optax.sgd(1.0)), frozen, batch)
    gradient = jax.tree.map(jnp.subtract, trainable, new.trainable)
    for n in range(3):
        direction = jax.tree.map(lambda x, n=n: jnp.cos(n + jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), trainable)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
        ahead, behind = (loss(jax.tree.map(lambda x, d, e=e: x + e * d, trainable, direction)) for e in (3e-3, -3e-3))
        np.testing.assert_allclose(slope, (ahead - behind) / 6e-3, rtol=5e-3)


def test_training_lowers_the_loss_and_touches_only_what_is_trainable(key):
    step, state, frozen = start(key)
    before = jax.tree.map(np.asarray, frozen)
    batch = toy.batch(key)
    losses_seen = []
    for _ in range(20):
        state, metrics = step(state, frozen, batch)
        losses_seen.append(metrics["loss"].value())
    assert losses_seen[-1] < 0.7 * losses_seen[0]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, frozen), before)
    assert int(state.step) == 20


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_one_batch_though_rows_hold_different_numbers_of_tokens(key, accumulation):
    batch = toy.batch(key, rows=8)
    mask = batch.loss_mask.at[0].set(0.0).at[1, 5:].set(0.0)
    batch = Batch(batch.tokens, mask, batch.positions, batch.segment_ids)
    sgd = optax.sgd(1.0)
    whole, state, frozen = start(key, optimizer=sgd)
    parts, other, _ = start(key, optimizer=sgd, accumulation=accumulation)
    state, expected = whole(state, frozen, batch)
    other, got = parts(other, frozen, batch)
    chex.assert_trees_all_close(other.trainable, state.trainable, rtol=1e-5, atol=1e-7)
    assert values(got) == pytest.approx(values(expected), rel=1e-5)


def complete(frozen, batch):
    return losses.with_reference(batch, SCORE(peft.reference(frozen), batch))


def pairs(key):
    rows = toy.batch(key, rows=8)
    return jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), rows)


@pytest.mark.parametrize("method", [METHOD, peft.full("everything")])
def test_the_reference_of_a_step_is_the_frozen_tree_and_stays_what_it_was(key, method):
    method = peft.anchored(method)
    frozen, trainable = method.init(key, toy.init(key))
    step = train.make_train_step(SCORE, method, losses.dpo, optax.sgd(0.5), complete=complete)
    state, batch = train.init_state(key, trainable, method, optax.sgd(0.5)), pairs(key)
    expected = complete(frozen, batch).reference_logps
    seen = []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        seen.append(values(metrics))
    assert seen[0]["loss"] == pytest.approx(np.log(2), rel=1e-6) and seen[0]["kl"] == 0
    assert seen[0]["loss"] > seen[1]["loss"] > seen[2]["loss"] and seen[2]["kl"] > 0
    np.testing.assert_array_equal(complete(frozen, batch).reference_logps, expected)


SPLITS = [(1, 1), (4, 1), (1, 8), (2, 4)]
"""Into so many micro-batches, over so many devices."""
MOMENTUM = optax.sgd(0.1, momentum=0.9)  # its memory after one step is the gradient


def away(key, method):
    """Return `(frozen, trainable)` away from the reference, so that there is a distance to it."""
    frozen, trainable = method.init(key, toy.init(key))
    return frozen, jax.tree.map(lambda x: x + 0.1, trainable)


def steps_over(devices, key, method, loss_fn, batch, *, steps=1, **options):
    """Take steps with the rows split over devices; return the metrics of each, and the state."""
    mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
    frozen, trainable = away(key, method)
    state = train.init_state(key, trainable, method, MOMENTUM, carried=options.get("carried", {}))
    where = sharding.state_shardings(state, mesh)
    step = train.make_train_step(SCORE, method, loss_fn, MOMENTUM, complete=complete, state_sharding=where, **options)
    state, frozen = jax.device_put((state, frozen), (where, sharding.shardings(frozen, mesh)))
    placed, seen = sharding.shard_batch(jax.tree.map(np.asarray, batch), mesh), []
    for _ in range(steps):
        state, metrics = step(state, frozen, placed)
        seen.append(values(metrics))
    return seen, jax.device_get((state.trainable, state.opt_state, state.carried))


def test_a_baseline_is_one_number_however_a_step_is_split_and_over_how_many_devices(key):
    rows, others = toy.batch(key, rows=8), toy.batch(jax.random.fold_in(key, 1), rows=8)
    others = dataclasses.replace(others, loss_mask=others.loss_mask.at[0].set(0.0).at[1, 5:].set(0.0))
    batch = dataclasses.replace(rows, desirable=jnp.arange(8) % 3 > 0, mismatched=others)

    def measure(params, frozen, batch):
        found = complete(frozen, batch.mismatched)
        return losses.kl_baseline(SCORE(params, found), found)

    method, loss_fn = peft.anchored(METHOD), partial(losses.kto, beta=0.5)
    options = {"baseline": train.Baseline(measure, losses.with_baseline)}
    frozen, trainable = away(key, method)
    logratios = np.float64(SCORE(method.attach(frozen, trainable), others).logps - complete(frozen, others).reference_logps)
    ((first,), state), *rest = [steps_over(n, key, method, loss_fn, batch, accumulation=parts, **options) for parts, n in SPLITS]
    assert first["baseline"] == pytest.approx(logratios.sum() / 7, rel=1e-5) and first["baseline"] > 0
    for (metrics,), other in rest:
        assert metrics == pytest.approx(first, rel=1e-5)
        chex.assert_trees_all_close(other, state, rtol=1e-5, atol=1e-7)


def test_a_batch_that_does_not_divide_is_an_error(key):
    step, state, frozen = start(key, accumulation=3)
    with pytest.raises(ValueError, match="4 rows cannot be split into 3"):
        step(state, frozen, toy.batch(key))


def test_a_step_that_is_not_finite_changes_nothing_and_says_so(key):
    step, state, frozen = start(key)
    state, metrics = step(state, frozen, toy.batch(key))
    assert values(metrics)["skipped"] == 0
    kept = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    poisoned = {**frozen, "embed_tokens": {"kernel": frozen["embed_tokens"]["kernel"].at[3].set(jnp.nan)}}
    state, metrics = step(state, poisoned, toy.batch(key))
    assert values(metrics)["skipped"] == 1 and int(state.step) == 2
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, (state.trainable, state.opt_state)), kept)
    state, metrics = step(state, frozen, toy.batch(key))
    assert values(metrics)["skipped"] == 0 and np.isfinite(values(metrics)["loss"])


def test_an_update_that_is_not_finite_is_skipped_too(key):
    step, state, frozen = start(key, optimizer=optax.sgd(float("inf")))
    state, metrics = step(state, frozen, toy.batch(key))
    assert values(metrics)["skipped"] == 1 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


def test_a_batch_without_a_supervised_token_is_skipped(key):
    step, state, frozen = start(key)
    batch = toy.batch(key)
    _, metrics = step(state, frozen, Batch(batch.tokens, jnp.zeros_like(batch.loss_mask), batch.positions, batch.segment_ids))
    assert values(metrics)["skipped"] == 1


def test_the_step_compiles_once_and_donates_the_state(key):
    traced = []
    score = lambda params, batch: (traced.append(1), SCORE(params, batch))[1]  # noqa: E731
    _, state, frozen = start(key)
    step = train.make_train_step(score, METHOD, losses.sft, optimizers.build("adamw", learning_rate=0.05, steps=10))
    first = state
    for n in range(3):
        state, _ = step(state, frozen, toy.batch(jax.random.key(n)))
    assert len(traced) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_dropout_follows_the_key_and_the_step(key):
    method = peft.lora("all-linear", rank=2, init="a_zero", dropout=0.5)
    step, state, frozen = start(key, method=method, optimizer=optax.sgd(0.0))
    state = train.init_state(key, jax.tree.map(lambda x: x + 0.3, state.trainable), method, optax.sgd(0.0))
    seen = []
    for _ in range(2):
        state, metrics = step(state, frozen, toy.batch(key))
        seen.append(metrics["loss"].value())
    evaluate = train.make_eval_step(SCORE, method, losses.sft)
    quiet = [evaluate(state.trainable, frozen, toy.batch(key))["loss"].value() for _ in range(2)]
    assert seen[0] != seen[1] and quiet[0] == quiet[1] and quiet[0] not in seen


def test_nothing_trainable_is_an_error(key):
    with pytest.raises(ValueError, match="nothing is trainable"):
        start(key, method=peft.neftune())


def halved(method):
    return method._replace(optimizer=lambda rule: optax.chain(rule, optax.scale(0.5)))


@pytest.mark.parametrize(
    ("wrap", "share"),
    [
        (halved, 0.5),
        (lambda method: peft.chain(halved(method), halved(peft.full("norms"))), 0.25),
        (lambda method: peft.on_layers(halved(method), "last 1"), 0.5),
    ],
    ids=["alone", "chained", "on some layers"],
)
def test_what_a_method_does_to_the_optimiser_is_done(key, wrap, share):
    method = wrap(peft.lora("all-linear", rank=2, init="gaussian"))
    moved = []
    for each in (method._replace(optimizer=lambda rule: rule), method):
        step, state, frozen = start(key, method=each, optimizer=optax.sgd(1.0))
        before = jax.tree.map(np.array, state.trainable)
        moved.append(jax.tree.map(np.subtract, step(state, frozen, toy.batch(key))[0].trainable, before))
    chex.assert_trees_all_close(jax.tree.map(lambda x: share * x, moved[0]), moved[1], rtol=1e-4, atol=1e-7)


def test_a_mean_of_the_steps_before_is_carried_however_a_step_is_split_and_over_how_many_devices(key):
    rows = toy.batch(key, rows=8)
    rows = dataclasses.replace(rows, desirable=jnp.arange(8) % 3 > 0, loss_mask=rows.loss_mask.at[0].set(0.0).at[1, 5:].set(0.0))
    seen = train.Carried(
        lambda trainable: Mean(jnp.zeros(()), jnp.zeros(())),
        lambda seen, frozen, batch: losses.with_baseline(batch, seen),
        lambda seen, done, trainable, metrics: seen + metrics["rewards"],
    )
    method, options = peft.anchored(METHOD), {"steps": 3, "carried": {"rewards": seen}}
    (first, state), *rest = [steps_over(n, key, method, losses.bco, rows, accumulation=parts, **options) for parts, n in SPLITS]
    means = [metrics["rewards"] for metrics in first]
    assert [metrics["delta"] for metrics in first] == pytest.approx([0, means[0], (means[0] + means[1]) / 2], rel=1e-5)
    assert state[2]["rewards"].value() == pytest.approx(sum(means) / 3, rel=1e-5) and abs(means[0]) > 1e-3
    assert state[2]["rewards"].weight == 3 * 7
    for metrics, other in rest:
        for got, expected in zip(metrics, first, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
        chex.assert_trees_all_close(other, state, rtol=1e-5, atol=1e-7)


def test_a_reference_follows_every_so_many_steps():
    """By hand: (0.25 · 8 + 0.75 · 4) = 5 where it moves, 4 where it does not, and the policy itself, 8, where alpha is 1."""
    reference, policy = {"a": jnp.array([4.0]), "n": jnp.array([1])}, {"a": jnp.array([8.0]), "n": jnp.array([2])}
    follow = jax.jit(losses.followed, static_argnames=("every_steps", "alpha"))
    for done, alpha, expected, count in ((3, 0.25, 5.0, 2), (4, 0.25, 4.0, 1), (6, 1.0, 8.0, 2)):
        moved = follow(reference, policy, jnp.array(done), every_steps=3, alpha=alpha)
        assert float(moved["a"][0]) == expected and int(moved["n"][0]) == count and moved["a"].dtype == jnp.float32
