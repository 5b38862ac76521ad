"""Members of a sweep are runs alone: the same numbers, the same base, nothing of one another."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, optimizers, peft, scoring, sweep, train, tree
from tests import toy

SCORE = partial(scoring.score, toy.MODEL, chunk_tokens=4)
MEMBERS = (
    {"seed": 0, "learning_rate": 0.05, "weight_decay": 0.0, "rank": 2, "alpha": 4.0},
    {"seed": 1, "learning_rate": 0.02, "weight_decay": 0.3, "rank": 4, "alpha": 4.0},
    {"seed": 2, "learning_rate": 0.1, "weight_decay": 0.1, "rank": 3, "alpha": 8.0},
)

LORA = ("lora", "adamw", 0, 2)


def make(kind, rank, alpha):
    low = peft.METHODS[kind]("all-linear", rank=rank, alpha=alpha, dropout=0.2)
    return peft.chain(low, peft.full("norm/scale"))


def rule(name, learning_rate, weight_decay):
    options = {"schedule_name": "cosine", "warmup_steps": 2, "final_fraction": 0.1, "steps": 8}
    return optimizers.build(name, learning_rate=learning_rate, weight_decay=weight_decay, clip_norm=0.5, **options)


def keys(members, use):
    return jnp.stack([jax.random.fold_in(jax.random.key(one["seed"]), use) for one in members])


def batches(count):
    return [toy.batch(jax.random.key(n)) for n in range(count)]


@functools.cache
def together(kind, optimizer, first, accumulation):
    """The step of the members from the first on, their states before it (a function), what is frozen, and their method."""
    members, params = MEMBERS[first:], toy.init(jax.random.key(7))
    numbers = {name: jnp.array([one[name] for one in members], jnp.float32) for name in members[0] if name != "seed"}

    def method(numbers):
        return make(kind, numbers["rank"], numbers["alpha"])

    def of(numbers):
        return rule(optimizer, numbers["learning_rate"], numbers["weight_decay"])

    methods = [make(kind, one["rank"], one["alpha"]) for one in members]
    own, trainable = jax.jit(partial(sweep.init, methods))(keys(members, 0), params)
    model = {name: branch for name, branch in jax.eval_shape(methods[0].init, keys(members, 0)[0], params)[0].items() if name in params}
    model = {**{name: params[name] for name in model}, "norm": model["norm"]}  # of which `full` left a hole
    frozen = sweep.Frozen(model, own, numbers)
    init = jax.jit(partial(sweep.init_state, method=method, optimizer=of))
    step = sweep.make_sweep_step(SCORE, method, losses.sft, of, accumulation=accumulation)
    return step, lambda: init(keys(members, 1), frozen, jax.tree.map(jnp.copy, trainable)), frozen, method


def alone(one, batches, *, kind, optimizer, accumulation):
    """The metrics of each step of a run, and its state."""
    method, optimizer = make(kind, one["rank"], one["alpha"]), rule(optimizer, one["learning_rate"], one["weight_decay"])
    frozen, trainable = jax.jit(method.init)(keys([one], 0)[0], toy.init(jax.random.key(7)))
    step = train.make_train_step(SCORE, method, losses.sft, optimizer, accumulation=accumulation)
    state, seen = train.init_state(keys([one], 1)[0], trainable, method, optimizer), []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        seen.append({name: mean.value() for name, mean in metrics.items()})
    return seen, state


@pytest.mark.parametrize(
    ("kind", "optimizer", "first", "accumulation", "compared"),
    [(*LORA, (0, 1, 2)), ("dora", "adamw", 1, 1, (2,)), ("lora_fa", "sgd", 1, 1, (2,))],
)
def test_each_member_equals_its_run_alone(kind, optimizer, first, accumulation, compared):
    step, start, frozen, _ = together(kind, optimizer, first, accumulation)
    state, found = start(), []
    for batch in batches(6):
        state, metrics = step(state, frozen, batch)
        found.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    for n in (index - first for index in compared):
        seen, final = alone(MEMBERS[n + first], batches(6), kind=kind, optimizer=optimizer, accumulation=accumulation)
        for metrics, expected in zip(found, seen, strict=True):
            assert {name: float(mean.total[n] / mean.weight[n]) for name, mean in metrics.items()} == pytest.approx(expected, rel=1e-5)
        got = sweep.member(state.members.trainable, n, final.trainable)
        for path, leaf in tree.flatten(final.trainable).items():
            np.testing.assert_allclose(tree.flatten(got)[path], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_every_optimizer_takes_abstract_numbers(name):
    params = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.ones(4)}

    def run(learning_rate, weight_decay):
        optimizer, now = rule(name, learning_rate, weight_decay), params
        state = optimizer.init(params)
        for n in range(3):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(jax.tree.map(lambda x, n=n: jnp.sin(x + n), now), state, now)
            now = optax.apply_updates(now, updates)
        return now

    found = jax.jit(jax.vmap(run))(jnp.array([0.1, 0.02]), jnp.array([0.0, 0.3]))
    for n, (learning_rate, weight_decay) in enumerate([(0.1, 0.0), (0.02, 0.3)]):
        expected = jax.jit(partial(run, learning_rate, weight_decay))()
        jax.tree.map(lambda x, y, n=n: np.testing.assert_allclose(x[n], y, rtol=2e-6, atol=1e-7), found, expected)


def test_what_pads_a_smaller_rank_stays_zero():
    step, start, frozen, _ = together(*LORA)
    state = start()
    for batch in batches(3):
        state, _ = step(state, frozen, batch)
    flat = tree.flatten(state.members.trainable)
    a, b = (np.asarray(flat[f"lora/layers/mlp/up_proj/kernel/{name}"]) for name in "ab")
    assert a.shape[-1] == 4 and not a[0, ..., 2:].any() and not b[0, :, 2:].any()
    assert a[1, ..., 2:].all() and b[0, :, :2].all()


def test_a_member_is_evaluated_as_alone_without_dropout():
    step, start, frozen, method = together(*LORA)
    state = start()
    for batch in batches(3):
        state, _ = step(state, frozen, batch)
    trainable = state.members.trainable
    found = sweep.make_sweep_eval_step(SCORE, method, losses.sft)(trainable, frozen, batches(1)[0])["loss"]
    own = make("lora", 3, 8.0)
    left, like = own.init(keys(MEMBERS[2:], 0)[0], toy.init(jax.random.key(7)))
    expected = train.make_eval_step(SCORE, own, losses.sft)(sweep.member(trainable, 2, like), left, batches(1)[0])["loss"]
    assert float(found.total[2] / found.weight[2]) == pytest.approx(expected.value(), rel=1e-6)


def test_the_base_is_there_once():
    step, start, frozen, _ = together("lora_fa", "sgd", 1, 1)
    text = step.lower(start(), frozen, batches(1)[0]).compile().as_text()
    assert "f32[2,3,4,16]" in text  # B of two members, three layers
    for shape in ("f32[2,3,8,16]", "f32[2,3,16,8]", "f32[2,8,16]", "f32[2,16,8]", "f32[2,17,8]", "f32[2,8,17]"):
        assert shape not in text, shape


def test_a_member_that_ended_stays_and_one_that_is_lost_disturbs_nobody():
    step, start, frozen, _ = together(*LORA)
    lost = frozen._replace(numbers={**frozen.numbers, "learning_rate": frozen.numbers["learning_rate"].at[0].set(jnp.inf)})
    state, other = start(), start()
    state = sweep.remember(state, jnp.array([True, True, False]), jnp.array([True, False, True]))
    before = [np.array(leaf[1]) for leaf in jax.tree.leaves(state.members.trainable)]
    for batch in batches(2):
        state, metrics = step(state, lost, batch)
        other, _ = step(other, frozen, batch)
    assert metrics["skipped"].total.tolist() == [1, 0, 0] and state.members.step.tolist() == [2, 0, 2]
    for now, then in zip(jax.tree.leaves(state.members.trainable), before, strict=True):
        np.testing.assert_array_equal(now[1], then)
    for now, expected in zip(*(jax.tree.leaves((s.members.trainable, s.members.opt_state)) for s in (state, other)), strict=True):
        np.testing.assert_array_equal(now[2], expected[2])


def test_the_best_of_a_member_is_kept_while_it_goes_on():
    step, start, frozen, _ = together(*LORA)
    state = start()
    first = jax.tree.map(np.array, state.best)
    state, _ = step(state, frozen, batches(1)[0])
    state = sweep.remember(state, jnp.array([False, True, False]), state.active)
    now = jax.tree.map(np.array, state.members.trainable)
    state, _ = step(state, frozen, batches(2)[1])
    for best, old, new in zip(*map(jax.tree.leaves, (state.best, first, now)), strict=True):
        np.testing.assert_array_equal(best[1], new[1])
        for n in (0, 2):
            np.testing.assert_array_equal(best[n], old[n])


def test_stacking_and_cutting_are_inverse_and_other_leaves_are_refused():
    trees = [{"a": jnp.ones((2, n)), "b": jnp.arange(n)} for n in (1, 3, 2)]
    stacked = sweep.stack(trees)
    assert stacked["a"].shape == (3, 2, 3) and stacked["b"][0].tolist() == [0, 0, 0]
    for n, one in enumerate(trees):
        jax.tree.map(np.testing.assert_array_equal, sweep.member(stacked, n, one), one)
    with pytest.raises(ValueError, match="member 1 has other leaves than member 0"):
        sweep.stack([{"a": jnp.ones(2)}, {"b": jnp.ones(2)}])
