"""Rules, placement and gathering on plain trees; `tests/contracts/mesh_test.py` trains on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ftjax import models, peft, quant, sharding, train, tree, weights
from ftjax.hf.lazy import LazyTensor
from ftjax.types import Batch, pytree
from tests import toy

CUBE = dict(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def cube():
    return sharding.make_mesh(**CUBE)


def specs(shapes, mesh, **options):
    return {row.path: row.spec for row in sharding.placed(shapes, mesh, **options)}


def abstract(name):
    return jax.eval_shape(models.build(models.preset(name)).init, jax.random.key(0))


# ---- mesh ----


def test_a_mesh_takes_what_is_left_and_leaves_sharding_to_the_compiler():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (dict(data=3), "data=3, fsdp=1, tensor=1, context=1 does not multiply to 8 devices"),
        (dict(fsdp=3), "does not multiply to 8 devices"),
        (dict(fsdp=-1), "at most one is -1"),
        (dict(data=0), "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_its_devices_is_an_error(sizes, said):
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(**sizes)


# ---- rules ----


@pytest.mark.parametrize("name", [name for name in models.PRESETS if name.startswith("tiny-")])
def test_every_leaf_of_every_family_adapter_and_optimiser_has_a_rule(name, cube, key):
    params = abstract(name)
    method = peft.chain(peft.lora(lambda path: path.endswith("kernel"), rank=2), peft.full(lambda path: not path.endswith("kernel")))
    frozen, trainable = jax.eval_shape(method.init, key, params)
    state = jax.eval_shape(partial(train.init_state, method=method, optimizer=optax.adamw(1e-3)), key, trainable)
    for shapes in (params, frozen, trainable, state):
        sharding.shardings(shapes, cube)


def test_matrices_are_split_by_column_then_by_row(cube):
    found = specs(abstract("tiny-qwen2"), cube)
    assert found["layers/self_attn/q_proj/kernel"] == found["layers/mlp/up_proj/kernel"] == P(None, "fsdp", "tensor")
    assert found["layers/self_attn/o_proj/kernel"] == found["layers/mlp/down_proj/kernel"] == P(None, "tensor", "fsdp")
    assert found["layers/self_attn/k_proj/bias"] == P(None, "tensor")
    assert found["embed_tokens/kernel"] == P("tensor", "fsdp")
    assert found["layers/input_layernorm/scale"] == P()
    assert specs(abstract("tiny-qwen3"), cube)["lm_head/kernel"] == P("fsdp", "tensor")


def test_an_adapter_lies_as_the_matrix_it_rides_on(cube, key):
    params = abstract("tiny-qwen3")
    trainable = jax.eval_shape(peft.lora(lambda path: path.endswith("kernel"), rank=2, name="second").init, key, params)[1]
    base, added = specs(params, cube), specs(trainable, cube)
    for path in (path for path in base if path.endswith("kernel")):
        *layers, i, o = base[path]
        assert added[f"second/{path}/a"] == P(*layers, i, None), path
        assert added[f"second/{path}/b"] == P(*layers, None, o), path


def test_a_packed_matrix_lies_as_the_dense_one(cube, key):
    params = abstract("tiny-qwen3")
    packed = jax.eval_shape(quant.nf4(".*(_proj|lm_head)/kernel", group=8).init, key, params)[0]
    base, found = specs(params, cube), specs(packed, cube)
    for path in (path for path in base if path.endswith(("_proj/kernel", "lm_head/kernel"))):
        *layers, i, o = base[path]
        assert found[f"{path}/codes"] == P(*layers, i, o) and {i, o} == {"fsdp", "tensor"}
        assert found[f"{path}/scales/codes"] == P(*layers, o, i)
        assert found[f"{path}/scales/scales"] == found[f"{path}/scales/mean"] == P()


def test_rows_that_share_a_scale_stay_on_one_device(cube):
    packed = jax.eval_shape(
        quant.int4(["lm_head"], group=8).init, None, {"lm_head": {"kernel": jax.ShapeDtypeStruct((24, 6), jnp.float32)}}
    )[0]
    assert specs(packed, cube) == {"lm_head/kernel/codes": P(None, "tensor"), "lm_head/kernel/scales": P(None, "tensor")}
    (row,) = sharding.report(packed, cube)
    assert row.dropped[0] == "lm_head/kernel/codes: axis 0 of 3 is not divisible by fsdp=2"


def test_an_axis_that_does_not_divide_is_replicated_and_reported(cube):
    shapes = {"lm_head": {"kernel": jax.ShapeDtypeStruct((6, 7), jnp.float32)}}
    (row,) = sharding.report(shapes, cube)
    assert specs(shapes, cube) == {"lm_head/kernel": P("fsdp", None)}
    assert row.dropped == ("lm_head/kernel: axis 1 of 7 is not divisible by tensor=2",)
    with pytest.raises(ValueError, match=r"'lm_head/kernel' \[6, 7\]: axis 1 of 7"):
        sharding.shardings(shapes, cube, strict=True)


def test_all_leaves_that_the_rules_do_not_fit_are_named(cube):
    shapes = {name: {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)} for name in ("lm_head", "lm_heed", "narrow", "odd")}
    mine = (("narrow/.*", P(None, None, "fsdp")), ("odd/.*", P("tensr")), *sharding.RULES)
    with pytest.raises(ValueError) as error:
        sharding.shardings(shapes, cube, mine)
    said = str(error.value)
    assert "3 problems" in said and "'lm_heed/kernel' has no rule; nearest path with one: 'lm_head/kernel'" in said
    assert "'narrow/kernel' [4, 4] has fewer axes than its rule" in said and "names the axis 'tensr'; nearest: 'tensor'" in said


def test_the_first_rule_wins_and_rest_takes_what_is_left(cube):
    shapes = {"norm": {"scale": jnp.ones(4)}, "other": jnp.ones((4, 4))}
    found = specs(shapes, cube, rules=(("norm/scale", P("fsdp")), *sharding.RULES, *sharding.REST))
    assert found == {"norm/scale": P("fsdp"), "other": P()}


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=4)], ids=["adamw", "adafactor"])
def test_moments_lie_as_their_leaf_and_the_rest_of_the_optimiser_is_replicated(optimizer, cube, key):
    method = peft.full("all-linear")
    carried = {"reference": train.Carried(lambda trainable: jax.tree.map(jnp.copy, trainable), None, None)}
    state = train.init_state(key, method.init(key, toy.init(key))[1], method, optimizer, carried=carried)
    where = sharding.state_shardings(state, cube)
    assert where.carried["reference"] == where.trainable
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.trainable)}
    for leaf, there in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(where.opt_state), strict=True):
        assert there.is_fully_replicated == (leaf.shape not in shapes)
    assert where.key.is_fully_replicated and not where.trainable["full"]["layers"]["mlp"]["up_proj"]["kernel"].is_fully_replicated


def test_the_report_adds_up_to_what_a_device_holds(cube, key):
    params = sharding.place(jax.tree.map(np.asarray, toy.init(key)), cube)
    rows = sharding.report(params, cube)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert sum(row.device_bytes for row in rows) == held < tree.num_bytes(params) / 3
    assert (sum(row.leaves for row in rows), sum(row.parameters for row in rows)) == (4, tree.size(params))


# ---- placement ----


def test_a_file_is_read_block_by_block_and_each_block_once(cube):
    host, read = np.arange(4 * 6 * 8.0, dtype=np.float32).reshape(4, 6, 8), []

    def fetch(index):
        read.append(index)
        return host[index]

    array = sharding.placement(cube)("layers/mlp/up_proj/kernel", LazyTensor(host.shape, host.dtype, fetch))
    np.testing.assert_array_equal(array, host)
    assert [host[index].shape for index in read] == [(4, 3, 4)] * 4
    assert {shard.data.shape for shard in array.addressable_shards} == {(4, 3, 4)}


def test_fresh_values_are_made_in_shards_and_equal_to_those_of_one_device(cube, key):
    params = sharding.init_on_mesh(toy.init, key, mesh=cube)
    assert params["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (3, 4, 8)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), params, toy.init(key))


def test_a_method_and_a_state_share_the_buffers_they_are_given(cube, key):
    params = sharding.init_on_mesh(toy.init, key, mesh=cube)
    method = peft.chain(peft.lora("all-linear", rank=2), peft.full("norms"))
    frozen, trainable = sharding.init_on_mesh(method.init, key, params, mesh=cube)
    state = sharding.init_on_mesh(partial(train.init_state, method=method, optimizer=optax.adam(1e-3)), key, trainable, mesh=cube)

    def buffers(arrays):
        return [x.addressable_shards[3].data.unsafe_buffer_pointer() for x in jax.tree.leaves(arrays)]

    assert set(buffers(frozen)) <= set(buffers(params))
    assert buffers(state.trainable) == buffers(trainable)
    expected = method.init(key, toy.init(key))[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state.trainable, expected)


def test_a_batch_is_split_by_rows_and_must_divide(cube, key):
    batch = jax.tree.map(np.asarray, toy.batch(key, rows=8))
    placed = sharding.shard_batch(batch, cube)
    np.testing.assert_array_equal(placed.tokens, batch.tokens)
    assert placed.tokens.addressable_shards[0].data.shape == (2, 9)
    assert sharding.batch_share(cube) == (0, 1)
    with pytest.raises(ValueError, match=r"6 rows do not divide over data\*fsdp=4"):
        sharding.shard_batch(jax.tree.map(lambda x: x[:6], batch), cube)
    with pytest.raises(ValueError, match="9 tokens do not divide over context=2"):
        sharding.shard_batch(batch, sharding.make_mesh(tensor=2, context=2))


# ---- leaves that gather themselves ----


@pytree
class Doubled(weights.Weight):
    """`materialize() == 2 * q`, with `q` of whole numbers: a stand-in for quantised leaves."""

    q: jax.Array

    @property
    def shape(self):
        return self.q.shape

    @property
    def dtype(self):
        return jnp.dtype(jnp.float32)

    def materialize(self):
        return 2.0 * self.q.astype(jnp.float32)


QUANTISED = ((r"layers/mlp/up_proj/kernel/q", P(None, "fsdp", "tensor")), *sharding.RULES)


def quantised(key):
    params = toy.init(key)
    up = params["layers"]["mlp"]["up_proj"]["kernel"]
    return tree.replace(params, {"layers/mlp/up_proj/kernel": Doubled(jnp.round(up * 4).astype(jnp.int8))})


@pytest.mark.parametrize("make", [toy.init, quantised], ids=["arrays", "integers"])
def test_a_model_on_a_mesh_is_the_same_function(make, cube, key):
    model = sharding.on_mesh(toy.MODEL, cube, QUANTISED)
    batch, params = toy.batch(key, packed=True), make(key)

    def total(model, params):
        hidden, _ = model.apply(params, batch.tokens, segment_ids=batch.segment_ids)
        return jnp.sum(jnp.square(model.unembed(model.head(params), hidden)))

    placed = sharding.place(jax.tree.map(np.asarray, params), cube, QUANTISED)
    run = jax.jit(jax.value_and_grad(total, argnums=1, allow_int=True), static_argnums=0)
    (value, gradient), (expected, expected_gradient) = run(model, placed), run(toy.MODEL, params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        if wanted.dtype == jnp.float32:
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(wanted))))
            assert wanted.ndim < 2 or got.addressable_shards[0].data.size < wanted.size  # gradients go back into shards


def test_the_backward_pass_keeps_shards_and_not_what_was_gathered(key):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    model, batch = sharding.on_mesh(toy.MODEL, mesh), toy.batch(key, rows=8)

    def total(params):
        return jnp.sum(model.apply(params, batch.tokens, segment_ids=batch.segment_ids)[0])

    params = sharding.place(jax.tree.map(np.asarray, toy.init(key)), mesh)
    compiled = jax.jit(jax.grad(total)).lower(params).compile().as_text()
    gathers = [line for line in compiled.splitlines() if " all-gather(" in line]
    assert any("f32[8,16]" in line or "f32[1,8,16]" in line for line in gathers)  # one layer at a time …
    assert not any("f32[3,8,16]" in line for line in compiled.splitlines())  # … and never all of them


def test_the_head_is_gathered_before_the_chunks_and_not_for_each(key):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    params = sharding.place(jax.tree.map(np.asarray, toy.init(key)), mesh)
    assert not params["embed_tokens"]["kernel"].sharding.is_fully_replicated
    head = jax.jit(lambda params: sharding.on_mesh(toy.MODEL, mesh).head(params).base)(params)
    assert head.sharding.is_fully_replicated


def test_on_one_device_a_model_is_left_alone():
    assert sharding.on_mesh(toy.MODEL, sharding.make_mesh(devices=jax.devices()[:1])) is toy.MODEL


def test_a_leaf_that_no_rule_covers_is_named_when_the_model_runs(cube, key):
    without_norms = [rule for rule in sharding.RULES if "norm" not in rule[0]]
    with pytest.raises(ValueError, match="'norm/scale' .* has no rule that fits"):
        sharding.on_mesh(toy.MODEL, cube, without_norms).head(toy.init(key))


def test_the_own_rows_of_all_processes_are_the_batch(monkeypatch):
    batch = Batch(*(np.arange(24).reshape(6, 4) + n for n in range(4)), advantages=np.arange(6.0))
    parts = []
    for index in range(3):
        monkeypatch.setattr("ftjax.sharding.mesh.batch_share", lambda mesh, index=index: (index, 3))
        parts.append(sharding.own_rows(batch, None))
    for whole, *own in zip(*map(jax.tree.leaves, (batch, *parts)), strict=True):
        np.testing.assert_array_equal(np.concatenate(own), whole)
