from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, optimizers, peft, scoring, tree
from tests import toy

PARAMS = {"lora": {"q": {"a": jnp.ones(3), "b": jnp.ones(3)}}, "full": {"norm": {"scale": jnp.ones(3)}}}
GRADS = {
    "lora": {"q": {"a": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array([1.0, 2.0, -2.0])}},
    "full": {"norm": {"scale": jnp.array([0.1, 0.1, 0.1])}},
}


@pytest.fixture(autouse=True)
def lenient_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its step counts
        yield


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("cosine", [0.25, 0.5, 0.75, *(0.5 + 0.5 * np.cos(np.pi * np.arange(7) / 7))]),
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]),
    ],
)
def test_schedules_are_the_ones_of_the_docstring(name, expected):
    rate = optimizers.schedule(name, learning_rate=1.0, steps=10, warmup_steps=3, decay_steps=2)
    np.testing.assert_allclose([rate(step) for step in range(10)], expected, atol=1e-6)


def test_adamw_equals_the_formula_in_float64():
    optimizer = optimizers.build("adamw", learning_rate=0.1, steps=3, weight_decay=0.01, clip_norm=None, b1=0.8, b2=0.9, eps=1e-6)
    params, state = PARAMS, optimizer.init(PARAMS)
    g, w = np.array([0.3, -0.2, 0.1], np.float64), np.ones(3)
    m = v = np.zeros(3)
    for step in range(1, 4):
        updates, state = optimizer.update(GRADS, state, params)
        params = _apply(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.1 * (m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-6) + 0.01 * w)
    np.testing.assert_allclose(params["lora"]["q"]["a"], w, rtol=1e-5)


def _apply(params, updates):
    return jax.tree.map(jnp.add, params, updates)


def test_norms_are_not_decayed():
    optimizer = optimizers.build("sgd", learning_rate=1.0, steps=1, weight_decay=0.5, clip_norm=None)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["full"]["norm"]["scale"], [-0.1] * 3, rtol=1e-6)
    np.testing.assert_allclose(updates["lora"]["q"]["a"], -(np.array([0.3, -0.2, 0.1]) + 0.5), rtol=1e-6)


def test_groups_multiply_the_rate_of_what_they_match():
    plain = optimizers.build("adamw", learning_rate=0.1, steps=1)
    plus = optimizers.build("adamw", learning_rate=0.1, steps=1, groups=[(r"lora/.*/b", 16.0), (r"lora/.*", 2.0)])
    a, _ = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    b, _ = plus.update(GRADS, plus.init(PARAMS), PARAMS)
    np.testing.assert_allclose(b["lora"]["q"]["b"], 16 * a["lora"]["q"]["b"], rtol=1e-6)
    np.testing.assert_allclose(b["lora"]["q"]["a"], 2 * a["lora"]["q"]["a"], rtol=1e-6)
    np.testing.assert_array_equal(b["full"]["norm"]["scale"], a["full"]["norm"]["scale"])


def test_lora_plus_is_one_group(key):
    """Hayou et al., 2024, arXiv 2402.12354: B learns 16 times as fast as A. Under SGD an update is the rate times the gradient."""
    method = peft.lora(rank=2, init="gaussian")
    frozen, trainable = method.init(key, toy.init(key))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    batch, score = toy.batch(key), partial(scoring.score, toy.MODEL)
    gradient = jax.grad(lambda t: losses.sft(score(method.attach(frozen, t), batch), batch)[0].total)(trainable)
    optimizer = optimizers.build("sgd", learning_rate=0.1, steps=1, clip_norm=None, groups=((".*/b", 16.0),))
    updates, _ = optimizer.update(gradient, optimizer.init(trainable), trainable)
    for path, update in tree.flatten(updates).items():
        rate = 1.6 if path.endswith("/b") else 0.1
        assert float(jnp.abs(update).max()) > 0
        np.testing.assert_allclose(update, -rate * tree.flatten(gradient)[path], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    optimizer = optimizers.build("sgd", learning_rate=1.0, steps=1, clip_norm=0.5)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    flat = np.concatenate([updates["lora"]["q"]["a"], updates["lora"]["q"]["b"], updates["full"]["norm"]["scale"]])
    assert np.linalg.norm(flat) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("name, rate", [("adamw", 0.1), ("lion", 0.05), ("adafactor", 0.3), ("sgd", 0.3)])
def test_every_rule_finds_the_bottom_of_a_bowl(name, rate):
    optimizer = optimizers.build(name, learning_rate=rate, steps=200, schedule_name="linear", momentum=0.5)
    params = {"w": jnp.array([3.0, -2.0])}
    state = optimizer.init(params)
    for _ in range(200):
        updates, state = optimizer.update({"w": 2 * params["w"]}, state, params)
        params = _apply(params, updates)
    assert float(jnp.abs(params["w"]).max()) < 0.3  # from 3.0


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'adamw'"):
        optimizers.build("adam", learning_rate=1.0, steps=1)
    with pytest.raises(ValueError, match="'cosine'"):
        optimizers.schedule("cosin", learning_rate=1.0, steps=1)
    with pytest.raises(ValueError, match="lora/q/b"):
        optimizers.build("sgd", learning_rate=1.0, steps=1, groups=[("lora/q/bb", 2.0)]).init(PARAMS)
