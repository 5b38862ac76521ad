"""Delta-LoRA without moving the matrix computes what moving it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, train, tree
from tests import toy
from tests.peft.literal import SCORE, gradient_of, paths, product, updated

RATIO, STEPS = 0.7, 7


def literally(params, trained, batch, start_steps):
    """LoRA over W_t with Adam; from step K on W moves by λ s (A' B' - A B). Yield the loss before each step, at last the dense tree."""
    lora, rule = peft.lora(["up_proj", "down_proj"], rank=2, alpha=4), optax.adam(0.02)
    state = rule.init(trained)
    gradient = gradient_of(lora, batch)

    for t in range(STEPS):
        loss, grads = gradient(trained, params)
        yield loss
        updates, state = updated(rule, grads, state)
        before, trained = trained, optax.apply_updates(trained, updates)
        if t >= start_steps:
            moves = {path: RATIO * 2 * (product(trained, path) - product(before, path)) for path in paths(before)}
            params = tree.replace(params, {path: tree.flatten(params)[path] + move for path, move in moves.items()})
    yield peft.merge(lora, params, trained)


@pytest.mark.parametrize("start_steps", [0, 3])
def test_it_computes_what_moving_the_matrix_computes(start_steps, key):
    method = peft.delta_lora(["up_proj", "down_proj"], rank=2, alpha=4, ratio=RATIO, start_steps=start_steps)
    params, batch = toy.init(key), toy.batch(key)
    frozen, trainable = method.init(key, params)
    start = {"lora": tree.unflatten({p: x for p, x in tree.flatten(trainable["delta_lora"]).items() if p.endswith(("/a", "/b"))})}
    *want, dense = literally(params, jax.tree.map(jnp.copy, start), batch, start_steps)
    step = train.make_train_step(SCORE, method, losses.sft, optax.adam(0.02))
    state, seen = train.init_state(key, jax.tree.map(jnp.copy, trainable), method, optax.adam(0.02)), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        seen.append(metrics["loss"].value())
    np.testing.assert_allclose(seen, want, rtol=1e-5)
    got = peft.merge(method, frozen, state.trainable)
    for path, leaf in tree.flatten(dense).items():
        np.testing.assert_allclose(tree.flatten(got)[path], leaf, atol=2e-5, err_msg=path)
    apart = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True)]
    assert max(apart) > 0.05 and step._cache_size() == 1


def test_it_is_lora_of_a_larger_scale_whose_gradients_are_divided_by_as_much(key):
    params, batch = toy.init(key), toy.batch(key)
    delta, lora = peft.delta_lora(rank=2, alpha=4, ratio=RATIO), peft.lora(rank=2, alpha=4 * (1 + RATIO))
    trained = jax.tree.map(lambda x: x + 0.1, lora.init(key, params)[1]["lora"])

    def loss(trained, method, name):
        return losses.sft(SCORE(method.attach(params, {name: trained}), batch), batch)[0].total

    got, want = (jax.grad(loss)(trained, method, name) for method, name in ((delta, "delta_lora"), (lora, "lora")))
    for path, gradient in tree.flatten(want).items():
        np.testing.assert_allclose(tree.flatten(got)[path] * (1 + RATIO), gradient, rtol=1e-4, atol=1e-5, err_msg=path)


def test_the_optimiser_keeps_no_more_than_for_lora(key):
    def size(method):
        return tree.num_bytes(train.init_state(key, method.init(key, toy.init(key))[1], method, optax.adam(0.1)).opt_state)

    lora = size(peft.lora(rank=2))
    assert size(peft.delta_lora(rank=2)) == lora
    assert size(peft.delta_lora(rank=2, start_steps=5)) == lora + 4  # its count of updates


@pytest.mark.parametrize(("start_steps", "rank"), [(0, 2), (3, 4)])
def test_it_is_a_plain_lora_of_rank_r_or_2r(start_steps, rank, key):
    method = peft.delta_lora(rank=2, alpha=6, rslora=True, ratio=RATIO, start_steps=start_steps)
    params = toy.init(key)
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    plain, (row,) = peft.plain(frozen, trainable, method.plan(params))
    assert row.options["rank"] == rank
    lora = peft.lora(rank=rank, alpha=row.options["alpha"], rslora=True)
    got = peft.merge(lora, params, {"lora": plain["delta_lora"]})
    for path, leaf in tree.flatten(peft.merge(method, frozen, trainable)).items():
        np.testing.assert_allclose(tree.flatten(got)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"start_steps": -1}, {"init": "pissa"}])
def test_what_it_has_not_is_refused(options):
    with pytest.raises(ValueError, match="delta_lora: "):
        peft.delta_lora(**options)
