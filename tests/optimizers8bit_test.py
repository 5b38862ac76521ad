"""Moments in eight bits: bitsandbytes' codes step by step, a quarter of the bytes, and the convergence of 32 bits."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from ftjax import losses, optimizers, optimizers8bit, peft, scoring, sharding, train, tree
from ftjax.checkpoint import Checkpoints, Record
from ftjax.optimizers8bit import UNSIGNED, scale_by_adam8bit, scale_by_lion8bit
from ftjax.types import TrainState
from tests import toy

GOLDEN = load_file(pathlib.Path(__file__).parent / "goldens" / "bitsandbytes_optimizers.safetensors")
RULES = {"adamw": scale_by_adam8bit, "lion": scale_by_lion8bit}
EXACT = {"adamw": optax.scale_by_adam, "lion": partial(optax.scale_by_lion, b1=0.9, b2=0.99)}
rules = pytest.mark.parametrize("name", RULES)


@pytest.fixture(autouse=True)
def lenient_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its step counts
        yield


def test_the_unsigned_code_is_theirs():
    np.testing.assert_array_equal(UNSIGNED, GOLDEN["unsigned"])


@rules
def test_parameters_codes_and_scales_are_theirs_after_every_step(name):
    """But for one number of a thousand: where it lies between two of the code, the rounding of the sum before decides."""
    rule = optimizers.build(f"{name}8bit", learning_rate=0.01, steps=9, weight_decay=0.1, clip_norm=None)
    params = {"kernel": jnp.asarray(GOLDEN["start"], jnp.float32)}
    state, update = rule.init(params), jax.jit(rule.update)
    for gradient in GOLDEN["gradients"]:
        updates, state = update({"kernel": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    off = np.abs(params["kernel"] - GOLDEN[f"{name}/end"])
    assert np.mean(off > 1e-6) < 1e-3 and off.max() < 1e-3
    for n, moment in enumerate((state[0].mu, *([state[0].nu] if name == "adamw" else [])), start=1):
        steps = np.abs(np.asarray(moment.values["kernel"], np.int32) - GOLDEN[f"{name}/state{n}"])
        assert np.mean(steps > 0) < 1e-3 and steps.max() <= 2
        np.testing.assert_allclose(moment.scales["kernel"], GOLDEN[f"{name}/absmax{n}"], rtol=1e-6)


@rules
def test_the_state_takes_a_quarter_and_small_leaves_stay_as_they_are(name):
    params = {"kernel": jnp.zeros((2, 64, 64)), "small": jnp.zeros(4095), "edge": jnp.zeros(4096)}
    state = RULES[name]().init(params)
    assert {path: leaf.dtype.name for path, leaf in state.mu.values.items()} == {"kernel": "uint8", "small": "float32", "edge": "uint8"}
    assert state.mu.scales["small"] is None and state.mu.scales["kernel"].shape == (32,)
    large = {"kernel": params["kernel"]}
    moments = [rule.init(large)[-1 if name == "lion" else slice(1, 3)] for rule in (RULES[name](), EXACT[name]())]
    assert tree.num_bytes(moments[0]) / tree.num_bytes(moments[1]) == (1 + 4 / 256) / 4


def test_members_side_by_side_and_shards_of_a_mesh_are_each_the_rule_alone(key):
    rule, g = scale_by_adam8bit(), jax.random.normal(key, (2, 8, 512))

    @jax.jit
    def two_steps(g):
        _, state = rule.update({"kernel": g}, rule.init({"kernel": g}))
        return rule.update({"kernel": 2 * g}, state)

    alone = two_steps(g[0])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), jax.jit(jax.vmap(two_steps))(g), alone)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    there = jax.device_put(g[0], jax.NamedSharding(mesh, jax.P("fsdp")))
    jax.tree.map(np.testing.assert_array_equal, two_steps(there), alone)


def test_on_a_mesh_codes_lie_as_their_leaf_and_scales_everywhere():
    params = {"lora": {"layers": {"self_attn": {"q_proj": {"kernel": {"a": jnp.zeros((2, 256, 16))}}}}}}
    state = jax.eval_shape(lambda p: TrainState(jnp.zeros(()), jax.random.key(0), p, scale_by_adam8bit().init(p)), params)
    where = sharding.state_shardings(state, sharding.make_mesh(data=2, fsdp=4))
    values, scales = (jax.tree.leaves(part)[0] for part in where.opt_state.nu)
    assert values.spec == jax.P(None, "fsdp", None) and scales.spec == jax.P()


@rules
def test_a_regression_is_solved_as_with_32_bits(name, key):
    """Directions of very different curvature: the squared gradients of a block then span many orders of magnitude."""
    x = jax.random.normal(key, (128, 64)) * jnp.logspace(0, -2, 64)[None]
    w = jax.random.normal(jax.random.key(1), (64, 64))

    def loss(found):
        return jnp.mean(jnp.square(x @ (found - w)))

    @jax.jit
    def solve():
        def ended(scale):
            rule = optax.chain(scale, optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.0, 300)))

            def step(carry, _):
                updates, state = rule.update(jax.grad(loss)(carry[0]), carry[1])
                return (carry[0] + updates, state), None

            return loss(jax.lax.scan(step, (jnp.zeros_like(w), rule.init(w)), length=300)[0][0])

        return ended(RULES[name]()), ended(EXACT[name]()), loss(jnp.zeros_like(w))

    packed, exact, start = map(float, solve())
    assert packed < 1e-3 * start and packed == pytest.approx(exact, rel=1)


def test_a_language_model_learns_as_with_32_bits_and_resumes_bit_for_bit(tmp_path):
    method, batch, score = peft.full("layers/.*"), toy.batch(jax.random.key(2)), partial(scoring.score, toy.MODEL)
    frozen, start = method.init(jax.random.key(0), toy.init(jax.random.key(0)))
    ended = {}
    for scale in (scale_by_adam8bit(min_size=1), optax.scale_by_adam()):
        rule = optax.chain(scale, optax.scale_by_learning_rate(0.03))
        step = train.make_train_step(score, method, losses.sft, rule)
        state, seen = train.init_state(jax.random.key(1), jax.tree.map(jnp.copy, start), method, rule), []
        for _ in range(40):
            state, metrics = step(state, frozen, batch)
            seen.append(metrics["loss"].value())
        ended[scale] = seen, state, step
    (seen, state, step), (exact, *_) = ended.values()
    assert exact[-1] < 0.7 * exact[0] and seen[-1] == pytest.approx(exact[-1], rel=0.05) and seen != exact
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, Record(40, {}))
    checkpoints.wait()
    found, _ = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(data, step(one, frozen, batch)[0]) for one in (found, state)))


def data(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_a_restart_of_relora_forgets_moments_in_eight_bits():
    method = peft.relora(["up_proj"], rank=4, every_steps=2, warmup_steps=0)
    rule = method.optimizer(scale_by_adam8bit(min_size=1))
    trainable = method.init(jax.random.key(0), toy.init(jax.random.key(0)))[1]
    state, gradient = rule.init(trainable), jax.tree.map(jnp.ones_like, trainable)
    sizes = []
    for _ in range(4):
        updates, state = jax.jit(rule.update)(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        sizes.append([float(leaf.max()) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "scales" in str(path)])
    assert min(sizes[0]) > 0 and 0.0 in {value for row in sizes for value in row} and min(sizes[-1]) > 0


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_a_leaf_is_updated_slab_by_slab_with_the_bits_of_the_whole(name, key, monkeypatch):
    """Blocks do not straddle slabs, so where a leaf is split changes nothing but the memory that a step works in."""
    params = {"stack": jax.random.normal(key, (6, 32, 64)), "table": jax.random.normal(key, (96, 72))}
    grads = jax.tree.map(jnp.sin, params)
    optimizer = optimizers.build(name, steps=10, learning_rate=0.1, schedule_name="constant", warmup_steps=0, clip_norm=None)

    def after(slab):
        monkeypatch.setattr(optimizers8bit, "SLAB", slab)
        step = jax.jit(lambda grads, state: optimizer.update(grads, state, params))
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = step(grads, state)
        return (updates, state), step.lower(grads, state).compile().memory_analysis().temp_size_in_bytes

    (whole, most), (slabs, least) = after(2**20), after(2**11)
    jax.tree.map(np.testing.assert_array_equal, whole, slabs)
    assert optimizers8bit._slabs((96, 72)) == 3  # of 32 rows: 2,304 numbers are nine blocks
    assert least < 0.5 * most
