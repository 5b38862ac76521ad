"""ReLoRA beside the matrix computes what merging into it computes, and a restart leaves the function as it is."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, train, tree
from ftjax.peft import inits, riding
from ftjax.peft.prune import pruned
from tests import toy
from tests.peft.literal import SCORE, gradient_of, paths, updated

TARGETS, EVERY, RESTARTS, WARMUP, STEPS, SEED = ["up_proj", "down_proj"], 3, 2, 2, 11, 5
MAKE = partial(peft.relora, TARGETS, rank=2, alpha=4, every_steps=EVERY, restarts=RESTARTS, warmup_steps=WARMUP, seed=SEED)


def literally(params, trained, batch, how):
    """LoRA over W with Adam; at a restart W += s A B, A is drawn anew, B = 0 and moments go. Yield the losses, at last the dense tree."""
    lora, rule = peft.lora(TARGETS, rank=2, alpha=4), optax.adam(0.02)
    state, last = rule.init(trained), 0
    gradient = gradient_of(lora, batch)

    for t in range(STEPS):
        loss, grads = gradient(trained, params)
        yield loss
        updates, state = updated(rule, grads, state)
        rise = min(1.0, (t - last + 1) / (WARMUP + 1)) if last else 1.0
        trained = optax.apply_updates(trained, jax.tree.map(lambda u, rise=rise: rise * u, updates))
        number = (t + 1) // EVERY
        if (t + 1) % EVERY == 0 and number <= RESTARTS:
            params, last = peft.merge(lora, params, trained), t + 1
            key = jax.random.fold_in(jax.random.key(SEED), number)
            flat = tree.flatten(params)
            fresh = {path: inits.uniform(riding.path_key(key, f"relora/{path}"), flat[path].shape, 2) for path in paths(trained)}
            trained = {
                "lora": tree.unflatten({f"{path}/{side}": x for path, ab in fresh.items() for side, x in zip("ab", ab, strict=True)})
            }
            adam = state[0]
            stays = jax.tree.map(how, adam.mu)
            mu, nu = (jax.tree.map(lambda x, stay: jnp.where(stay, x, 0), moment, stays) for moment in (adam.mu, adam.nu))
            state = (adam._replace(mu=mu, nu=nu), *state[1:])
    yield peft.merge(lora, params, trained)


def largest(moment):
    size = np.abs(np.asarray(moment, np.float64))
    return size > np.quantile(size, 0.9, axis=(-2, -1), keepdims=True)


STAYS = {"magnitude": largest, "reset": lambda moment: np.zeros(moment.shape, bool)}


@cache
def run(count=STEPS, **options):
    """Train; return the losses and what is trained after each step."""
    method, key = MAKE(**options), jax.random.key(0)
    frozen, trainable = method.init(key, toy.init(key))
    step = train.make_train_step(SCORE, method, losses.sft, optax.adam(0.02))
    state, seen, trained = train.init_state(key, jax.tree.map(jnp.copy, trainable), method, optax.adam(0.02)), [], []
    for _ in range(count):
        state, metrics = step(state, frozen, toy.batch(key))
        seen.append(metrics["loss"].value())
        trained.append(jax.tree.map(np.array, state.trainable))
    assert step._cache_size() == 1
    return seen, trained


@pytest.mark.parametrize("prune", STAYS)
def test_it_computes_what_merging_and_starting_again_computes(prune, key):
    method, params = MAKE(prune=prune), toy.init(key)
    _, trainable = method.init(key, params)
    start = {"lora": tree.unflatten({p: x for p, x in tree.flatten(trainable["relora"]).items() if p.endswith(("/a", "/b"))})}
    *want, dense = literally(params, start, toy.batch(key), STAYS[prune])
    seen, trained = run(prune=prune)
    np.testing.assert_allclose(seen, want, rtol=1e-5)
    got = peft.merge(method, params, trained[-1])
    for path, leaf in tree.flatten(dense).items():
        np.testing.assert_allclose(tree.flatten(got)[path], leaf, atol=2e-5, err_msg=path)


def test_a_restart_leaves_the_function_as_it_is(key):
    after, before = run(prune="magnitude")[1][EVERY - 1], run(EVERY, every_steps=100)[1][-1]
    params, batch = toy.init(key), toy.batch(key)
    got, want = (toy.apply(MAKE().attach(params, trained), batch.tokens, segment_ids=batch.segment_ids)[0] for trained in (after, before))
    np.testing.assert_allclose(got, want, atol=1e-6)
    b, past = (tree.flatten(after)[f"relora/layers/mlp/up_proj/kernel/{field}"] for field in ("b", "past_b"))
    assert not np.any(b) and np.any(past[:, :2]) and not np.any(past[:, 2:])


def test_the_factors_of_before_are_kept_bit_for_bit():
    _, trained = run(prune="magnitude")
    last = tree.flatten(trained[-1])
    for path, leaf in tree.flatten(trained[EVERY - 1]).items():
        kept = last[path]
        if path.endswith("past_a"):
            np.testing.assert_array_equal(kept[..., :2], leaf[..., :2], err_msg=path)
            assert np.any(kept[..., 2:])
        elif path.endswith("past_b"):
            np.testing.assert_array_equal(kept[..., :2, :], leaf[..., :2, :], err_msg=path)


def test_dropout_is_on_the_factors_of_now_alone(key):
    method = MAKE(dropout=0.5)
    frozen, trainable = method.init(key, toy.init(key))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    batch = toy.batch(key)

    def hidden(trainable, key=None):
        return toy.apply(method.attach(frozen, trainable, key=key), batch.tokens, segment_ids=batch.segment_ids)[0]

    assert not np.allclose(hidden(trainable, key), hidden(trainable), atol=1e-3)
    still = tree.unflatten({path: 0 * x if path.endswith("/b") else x for path, x in tree.flatten(trainable).items()})
    np.testing.assert_allclose(hidden(still, key), hidden(still), atol=1e-5)


def test_it_is_a_plain_lora_of_all_its_ranks(key):
    method, params = MAKE(), toy.init(key)
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    plain, (row,) = peft.plain(frozen, trainable, method.plan(params))
    assert (row.options["rank"], row.options["alpha"]) == (6, 12)
    got = peft.merge(peft.lora(TARGETS, rank=6, alpha=12), params, {"lora": plain["relora"]})
    for path, leaf in tree.flatten(peft.merge(method, frozen, trainable)).items():
        np.testing.assert_allclose(tree.flatten(got)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("rule", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.adafactor(0.1, min_dim_size_to_factor=4)])
@pytest.mark.parametrize("how", ["magnitude", "random", "reset"])
def test_a_share_of_the_moments_of_the_named_leaves_goes(how, rule, key):
    leaf = jax.random.normal(key, (2, 30, 40))
    params = {"mine": {"a": leaf}, "other": {"a": leaf}}
    with jax.numpy_dtype_promotion("standard"):
        state = rule.update(params, rule.init(params), params)[1]
    got = pruned(state, {"mine/a": leaf.shape}, how=how, ratio=0.75, key=key)
    gone = []
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("mine/a"):
            np.testing.assert_array_equal(after, before, err_msg=name)
        elif before.shape == leaf.shape:
            assert np.mean(after == 0) == pytest.approx(1.0 if how == "reset" else 0.75, abs=0.05), name
            np.testing.assert_array_equal(after, np.where(after != 0, before, 0))
            gone.append(after == 0)
        else:
            assert not np.any(after), name
    assert all((one == gone[0]).all() for one in gone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "expected every_steps >= 1"),
        ({"restarts": 0}, "without restarts it is lora"),
        ({"prune": "magnitud"}, "nearest: 'magnitude'"),
        ({"prune_ratio": 1.5}, "a share in"),
    ],
)
def test_what_it_has_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        peft.relora(**options)


def test_more_than_the_matrix_holds_is_refused(key):
    with pytest.raises(ValueError, match="rank 10 does not fit"):
        peft.relora(rank=2, restarts=4).init(key, toy.init(key))
