"""What every fine-tuning method must keep, whoever wrote it: a new one joins by a line in EXAMPLES."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, scoring, sharding, train, tree, weights
from ftjax.checkpoint import Checkpoints, Record
from ftjax.types import TrainState, masked_mean
from tests import tiny, toy

VECTORS = r".*(norm/scale|bias)"
EXAMPLES = {
    "lora": [
        partial(peft.lora, "all-linear", rank=2, alpha=4),
        partial(peft.lora, "everything", rank=2, init="a_zero", exclude=VECTORS, dropout=0.3),
    ],
    "dora": [
        partial(peft.dora, "all-linear", rank=2, alpha=4),
        partial(peft.dora, "everything", rank=2, init="a_zero", exclude=VECTORS, dropout=0.3),
    ],
    "loftq": [partial(peft.loftq, rank=2, format="int4", group=4, iterations=2)],
    "lora_fa": [partial(peft.lora_fa, "all-linear", rank=4), partial(peft.lora_fa, "everything", rank=4, exclude=VECTORS, dropout=0.3)],
    "full": [partial(peft.full, "everything"), partial(peft.full, "norms")],
    "ia3": [partial(peft.ia3, "all-linear"), partial(peft.ia3, "everything", exclude=VECTORS, feedforward=".*(down_proj|tokens)/kernel")],
    "vera": [partial(peft.vera, rank=5), partial(peft.vera, "everything", exclude=VECTORS, rank=9)],
    "hira": [partial(peft.hira, "everything", exclude=VECTORS, rank=2)],
    "loha": [partial(peft.loha, "everything", exclude=VECTORS, rank=3)],
    "lokr": [partial(peft.lokr, "everything", exclude=VECTORS, rank=1, decompose_both=True)],
    "miss": [partial(peft.miss, rank=3), partial(peft.miss, rank=4, form="bat")],
    "shira": [partial(peft.shira, "everything", exclude=VECTORS, rank=1)],
    "randlora": [partial(peft.randlora, "everything", exclude=VECTORS, rank=3, bases="sparse")],
    "oft": [partial(peft.oft, block_size=4), partial(peft.oft, block_size=8, neumann_terms=5, share=True)],
    "adalora": [partial(peft.adalora, "everything", exclude=VECTORS, steps=20, init_rank=4, target_rank=3, dropout=0.3)],
    "delta_lora": [partial(peft.delta_lora, rank=2), partial(peft.delta_lora, "everything", exclude=VECTORS, rank=2, start_steps=3)],
    "relora": [partial(peft.relora, "everything", exclude=VECTORS, rank=2, every_steps=7, restarts=2, dropout=0.3)],
    "boft": [partial(peft.boft, block_size=2, factors=3)],
    "bottleneck": [
        partial(peft.bottleneck, ["down_proj"], width=3, activation="identity"),
        partial(peft.bottleneck, ["down_proj"], width=5),
    ],
    "parallel_bottleneck": [partial(peft.parallel_bottleneck, width=3)],
    "value_head": [lambda: peft.chain(peft.value_head(), peft.lora("all-linear", rank=1))],
    "bitfit": [peft.bitfit],
    "norm_tuning": [peft.norm_tuning],
    "tokens": [partial(peft.tokens, range(1, 15, 2))],
    "prompt_tuning": [partial(peft.prompt_tuning, 3)],
    "p_tuning": [partial(peft.p_tuning, 3, hidden_size=6), partial(peft.p_tuning, 3, hidden_size=6, encoder="lstm")],
    "prefix_tuning": [partial(peft.prefix_tuning, 3), partial(peft.prefix_tuning, 3, hidden_size=6)],
    "neftune": [lambda: peft.chain(peft.neftune(), peft.lora("all-linear", rank=1))],
}
CASES = [pytest.param(make(), id=f"{name}{n}") for name, makes in EXAMPLES.items() for n, make in enumerate(makes)]
SOFT_PROMPTS = [case for case in CASES if case.id[:-1] in peft.SOFT_PROMPTS]  # for their own laws see tests/models/virtual_test.py
NEUTRAL = [case for case in CASES if case not in SOFT_PROMPTS]
MERGED = [case for case in NEUTRAL if case.id not in ("bottleneck1", "parallel_bottleneck0")]  # these are no matrices
IDENTICAL = [case for case in NEUTRAL if not case.id.startswith("loftq")]  # which starts near the dense model, not at it
both_dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def test_every_method_is_listed():
    assert set(EXAMPLES) == set(peft.METHODS)


HOMES = {case.values[0]: tiny for case in SOFT_PROMPTS}
"""The model of a method, where the toy has no slot for it."""


def base(method, key, dtype=jnp.float32):
    if method in HOMES:
        params = HOMES[method].init(key)
    else:
        params = toy.init(key)
        params["layers"]["mlp"]["down_proj"]["bias"] = jnp.full((toy.LAYERS, toy.DIM), 0.1)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def moved(trainable, key):
    """Return the trainable tree away from its start, so that a law about it says something."""
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)])


def hidden(params, batch):
    model = tiny if "self_attn" in params["layers"] else toy
    return model.apply(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)[0]


def objective(scores, batch):
    """Likely tokens and, where there is a value head, values of 1."""
    mean, metrics = losses.sft(scores, batch)
    if scores.values is None:
        return mean, metrics
    return dataclasses.replace(mean, total=mean.total + masked_mean(jnp.square(scores.values - 1), batch.loss_mask).total), metrics


@both_dtypes
@pytest.mark.parametrize("method", IDENTICAL)
def test_a_method_is_the_identity_at_init(method, dtype, key):
    params, batch = base(method, key, dtype), toy.batch(key)
    exact = jax.jit(hidden, compiler_options={"xla_backend_optimization_level": 3})  # at level 0 JAX 0.12 rounds two programs differently
    np.testing.assert_array_equal(exact(method.attach(*method.init(key, params)), batch), exact(params, batch))


@pytest.mark.parametrize("method", MERGED)
def test_dot_equals_materialize_and_merged_equals_unmerged(method, key):
    frozen, trainable = method.init(key, base(method, key))
    trainable, batch = moved(trainable, key), toy.batch(key)
    attached, merged = method.attach(frozen, trainable), peft.merge(method, frozen, trainable)
    assert not any(isinstance(leaf, weights.Weight) for leaf in tree.flatten(merged).values())
    for params in (attached, merged):
        got = scoring.score(toy.MODEL, params, batch).logps
        np.testing.assert_allclose(got, scoring.score(toy.MODEL, weights.dense(attached), batch).logps, rtol=1e-4, atol=1e-5)
    assert not np.allclose(hidden(merged, batch), hidden(base(method, key), batch), atol=1e-3)


@both_dtypes
@pytest.mark.parametrize("method", CASES)
def test_what_is_trainable_is_float32_and_named_after_a_method(method, dtype, key):
    frozen, trainable = method.init(key, base(method, key, dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}
    assert set(trainable) <= {row.method for row in method.plan(base(method, key))}
    attached = tree.flatten(method.attach(frozen, trainable))
    assert {attached[path].dtype for path in tree.flatten(base(method, key, dtype))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("method", CASES)
def test_the_plan_names_leaves_of_the_tree(method, key):
    params = jax.eval_shape(partial(base, method), key)
    rows = method.plan(params)
    assert rows and all(row.paths and set(row.paths) <= set(tree.flatten(params)) for row in rows)


@pytest.mark.parametrize("method", CASES)
def test_the_frozen_tree_shares_the_buffers_of_the_base(method, key):
    params = base(method, key)
    frozen, _ = method.init(key, params)
    own, flat = {row.method for row in method.plan(params)}, tree.flatten(params)
    assert set(frozen) <= set(params) | own
    model = {name: branch for name, branch in frozen.items() if name in params}
    assert all(leaf is flat[path] for path, leaf in tree.flatten(model).items() if isinstance(leaf, jax.Array))


@pytest.mark.parametrize("method", CASES)
def test_init_works_from_shapes_alone(method, key):
    shapes = jax.eval_shape(method.init, key, jax.eval_shape(partial(base, method), key))[1]
    values = method.init(key, base(method, key))[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), values)


@pytest.mark.parametrize("method", CASES)
def test_every_array_of_a_method_has_a_place_on_a_mesh(method, key):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharding.shardings(jax.eval_shape(method.init, key, jax.eval_shape(partial(base, method), key)), mesh)


@pytest.mark.parametrize("method", CASES)
def test_every_trainable_leaf_gets_a_gradient_and_a_method_learns_in_one_program(method, key, caplog):
    frozen, start = method.init(key, base(method, key))
    score = partial(scoring.score, HOMES.get(method, toy).MODEL, outputs=("logps", *(["values"] if "value_head" in start else [])))
    optimizer = optax.adam(0.03)
    step = train.make_train_step(score, method, objective, optimizer)
    state, batch, seen = train.init_state(key, jax.tree.map(jnp.copy, start), method, optimizer), toy.batch(key), []
    with jax.log_compiles():
        for _ in range(30):
            state, metrics = step(state, frozen, batch)
            seen.append(metrics["loss"].value())
    assert len([record for record in caplog.records if "Compiling" in record.getMessage()]) == 1
    assert np.mean(seen[-3:]) < 0.97 * seen[0]
    still = [path for path, leaf in tree.flatten(state.trainable).items() if np.array_equal(leaf, tree.flatten(start)[path])]
    assert not still


@pytest.mark.parametrize("method", CASES)
def test_what_a_method_trains_and_what_its_optimizer_remembers_are_saved_bit_for_bit(method, key, tmp_path):
    fresh = train.init_state(key, method.init(key, base(method, key))[1], method, optax.adam(0.03))
    there = jax.tree.map(lambda x: jnp.asarray(np.arange(1, x.size + 1).reshape(x.shape) % 5, x.dtype), (fresh.trainable, fresh.opt_state))
    state = TrainState(jnp.array(7), jax.random.fold_in(key, 1), *there)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, Record(7, {}))
    found, _ = checkpoints.restore(fresh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for (path, leaf), expected in zip(sharding.rules.paths(found), jax.tree.leaves(state), strict=True):
        assert leaf.dtype == expected.dtype, path
        same = (jax.random.key_data(one) if path == "key" else one for one in (leaf, expected))
        np.testing.assert_array_equal(*same, err_msg=path)


@pytest.mark.parametrize("method", CASES)
def test_nothing_is_random_without_a_key(method, key):
    frozen, trainable = method.init(key, base(method, key))
    trainable, batch = moved(trainable, key), toy.batch(key)
    np.testing.assert_array_equal(*(hidden(method.attach(frozen, trainable), batch) for _ in range(2)))
