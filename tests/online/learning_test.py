"""The step of reinforcement learning on a tiny model: it learns, begins with ratios of one, and does not care how its rows are split."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest

from ftjax import data, losses, online, peft, rollout, scoring, sharding
from ftjax.online import ESTIMATORS, Evidence
from ftjax.train import init_state, make_train_step
from tests import tiny

PROMPTS, SAMPLES, TOKENS = 4, 8, 6
WANTED = 5
METHOD = peft.full("everything")
METHODS = {"grpo": METHOD, "ppo": peft.chain(METHOD, peft.value_head(init="normal"))}
OPTIMIZER = optax.sgd(1.0)
ASKED = [np.arange(1, 4 + at % 2) for at in range(PROMPTS) for _ in range(SAMPLES)]

sample = online.sampler(
    rollout.Engine(tiny.MODEL, slots=PROMPTS * SAMPLES, slot_tokens=16), max_tokens=TOKENS, sampling=rollout.settings(temperature=1.0)
)


def experience(params, key):
    """Samples whose reward is the share of one token among them; the rows of a batch, and the mean reward."""
    prompts = [data.Prompt(tokens, data.Example()) for tokens in ASKED[::SAMPLES]]
    samples = sample(params, prompts, jax.random.split(key, (PROMPTS, SAMPLES)))
    rewards = np.array([np.mean(one.tokens == WANTED) for one in samples], np.float32).reshape(PROMPTS, SAMPLES)
    rows = online.rows(ASKED, samples, max_tokens=16)
    mask = rows.loss_mask.reshape(PROMPTS, SAMPLES, -1)
    advantages = ESTIMATORS["group_relative"].estimate(Evidence(rewards, np.ones_like(rewards), mask, 0 * mask))["advantages"]
    return dataclasses.replace(rows, advantages=np.asarray(advantages).reshape(-1)), rewards.mean()


def criticised(batch):
    """What PPO reads beside: an advantage and a return of each token, and what policy and critic said before."""
    random, mask = np.random.default_rng(0), batch.loss_mask
    drawn = lambda scale: (scale * random.standard_normal(mask.shape)).astype(np.float32) * mask  # noqa: E731
    told = {"advantages": drawn(1.0), "returns": drawn(1.0), "old_values": drawn(0.3), "old_logps": batch.behavior_logps + drawn(0.2)}
    return dataclasses.replace(batch, **told)


@pytest.fixture(scope="module")
def start():
    """`start(algorithm) -> (frozen, trainable)`, made anew at each call: a step donates its state."""
    return lambda name="grpo": METHODS[name].init(jax.random.key(0), tiny.init(jax.random.key(1)))


def make_step(name: str = "grpo", accumulation: int = 1, mesh=None, state=None):
    model = tiny.MODEL if mesh is None else sharding.on_mesh(tiny.MODEL, mesh)
    where = None if mesh is None else sharding.state_shardings(state, mesh)
    score = partial(scoring.score, model, outputs=("logps", "entropy", *(["values"] if name == "ppo" else [])))
    return make_train_step(score, METHODS[name], losses.LOSSES[name], OPTIMIZER, accumulation=accumulation, state_sharding=where)


@pytest.fixture(scope="module")
def step():
    return make_step()


@pytest.fixture(scope="module")
def one_step(start, step):
    """The batch of an experience, and what one step on all its rows makes of it."""
    frozen, trainable = start()
    batch, _ = experience(METHOD.attach(frozen, trainable), jax.random.key(3))
    state, metrics = step(init_state(jax.random.key(2), trainable, METHOD, OPTIMIZER), frozen, batch)
    return batch, jax.device_get(state.trainable), jax.device_get(metrics)


def test_a_tiny_model_learns_what_is_rewarded(start, step):
    frozen, trainable = start()
    state = init_state(jax.random.key(2), trainable, METHOD, OPTIMIZER)
    rewards = []
    for at in range(25):
        batch, reward = experience(METHOD.attach(frozen, state.trainable), jax.random.fold_in(jax.random.key(3), at))
        rewards.append(float(reward))
        state, _ = step(state, frozen, batch)
    assert np.mean(rewards[:3]) < 0.3 and np.mean(rewards[-3:]) > 0.9


def test_the_ratio_is_exactly_one_at_the_first_step(one_step):
    _, _, metrics = one_step
    assert [metrics[name].value() for name in ("ratio", "ratio/min", "ratio/max", "kl/old")] == [1, 1, 1, 0]
    assert metrics["entropy"].value() > 1


def test_old_log_probabilities_of_the_same_policy_are_ratios_of_one_up_to_rounding(one_step, start, step):
    batch, trained, _ = one_step
    frozen, trainable = start()
    logps = jax.jit(partial(scoring.score, tiny.MODEL))(METHOD.attach(frozen, trainable), batch).logps
    state, metrics = step(init_state(jax.random.key(2), trainable, METHOD, OPTIMIZER), frozen, dataclasses.replace(batch, old_logps=logps))
    assert metrics["ratio/max"].value() == pytest.approx(1, abs=1e-5) and metrics["clip/high"].value() == 0
    assert_close(state.trainable, trained)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, one_step, start):
    """`(algorithm, batch, what a step on all its rows makes of it, metrics)`."""
    name, (batch, trained, metrics) = request.param, one_step
    if name == "grpo":
        return name, batch, trained, metrics
    batch, (frozen, trainable) = criticised(batch), start(name)
    state, metrics = make_step(name)(init_state(jax.random.key(2), trainable, METHODS[name], OPTIMIZER), frozen, batch)
    metrics = jax.device_get(metrics)
    assert all(0 < metrics[f"clip/{side}"].value() < 1 for side in ("low", "high", "value"))
    return name, batch, jax.device_get(state.trainable), metrics


def test_micro_batches_equal_the_whole(whole, start):
    name, batch, trained, metrics = whole
    frozen, trainable = start(name)
    state, found = make_step(name, accumulation=4)(init_state(jax.random.key(2), trainable, METHODS[name], OPTIMIZER), frozen, batch)
    assert found["loss"].value() == pytest.approx(metrics["loss"].value(), abs=1e-6)
    assert_close(state.trainable, trained)


def test_eight_devices_equal_one(whole, start):
    name, batch, trained, metrics = whole
    mesh = sharding.make_mesh(data=2, fsdp=-1)
    frozen, trainable = (sharding.place(jax.tree.map(np.asarray, tree), mesh) for tree in start(name))
    state = sharding.init_on_mesh(partial(init_state, method=METHODS[name], optimizer=OPTIMIZER), jax.random.key(2), trainable, mesh=mesh)
    state, found = make_step(name, mesh=mesh, state=state)(state, frozen, sharding.shard_batch(batch, mesh))
    assert found["loss"].value() == pytest.approx(metrics["loss"].value(), abs=1e-6)
    assert_close(state.trainable, trained)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6), found, expected)
