"""What a mesh must keep: the numbers of one device, shards that stay where they are, and one program for all steps."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, quant, sharding, tree, types
from ftjax.checkpoint import Checkpoints, Record
from tests import meshed

MESHES = {
    "data8": dict(data=8),
    "fsdp8": dict(data=1, fsdp=8),
    "fsdp2_tensor2_context2": dict(data=1, fsdp=2, tensor=2, context=2),
}


@pytest.fixture(scope="module")
def alone():
    """The same training without a mesh, with the whole logits at once."""
    return meshed.train()


@pytest.fixture(scope="module")
def cube():
    return meshed.train(sharding.make_mesh(data=2, fsdp=2, tensor=2), chunk_tokens=5)


def assert_equal(run, alone, tolerance=1e-5):
    np.testing.assert_allclose(run.losses, alone.losses, rtol=tolerance)
    np.testing.assert_allclose(run.grad_norms, alone.grad_norms, rtol=tolerance)
    for path, leaf in run.trained.items():
        np.testing.assert_allclose(leaf, alone.trained[path], rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh_trains_to_the_weights_of_one_device(sizes, alone):
    assert_equal(meshed.train(sharding.make_mesh(**sizes), chunk_tokens=5), alone)


def test_rows_hidden_units_and_vocabulary_may_be_split_at_once(cube, alone):
    assert_equal(cube, alone)


def test_full_tuning_on_a_mesh_trains_to_the_weights_of_one_device():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert_equal(meshed.train(mesh, meshed.FULL, chunk_tokens=5), meshed.train(method=meshed.FULL))


def test_the_reference_of_full_tuning_is_split_as_the_policy_is():
    options = dict(method=meshed.ANCHORED, loss_fn=losses.dpo, responses=(2,))
    run = meshed.train(sharding.make_mesh(data=1, fsdp=8), chunk_tokens=5, **options)
    assert_equal(run, meshed.train(**options))
    assert run.losses[-1] < run.losses[0] == pytest.approx(np.log(2), rel=1e-6)
    copies, policy = tree.flatten(run.frozen[peft.REFERENCE]), tree.flatten(run.state.trainable["full"])
    assert copies.keys() == policy.keys()
    for path, leaf in copies.items():
        assert leaf.sharding.is_equivalent_to(policy[path].sharding, leaf.ndim), path
        parts = 8 if path.endswith("kernel") else 1
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


def test_column_norms_and_frozen_factors_on_a_mesh_train_to_the_weights_of_one_device():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert_equal(meshed.train(mesh, meshed.DORA_AND_FA, chunk_tokens=5), meshed.train(method=meshed.DORA_AND_FA))


def test_what_layers_share_and_what_a_leaf_keeps_frozen_lie_on_a_mesh_too():
    method = peft.chain(
        peft.vera(["q_proj", "down_proj"], rank=4, d_initial=1.0, layers="last 1"),
        peft.randlora(["k_proj"], rank=8),
        peft.shira(["v_proj"], rank=2),
        peft.oft(["o_proj"], block_size=8),
        peft.loha(["gate_proj"], rank=4),
        peft.bottleneck(["o_proj"], width=4),
        peft.parallel_bottleneck(["o_proj", "down_proj"], width=4),
        peft.tokens([5, 7, 120]),
        peft.p_tuning(3, hidden_size=8),
        peft.prefix_tuning(2, hidden_size=4),
        peft.adalora(["up_proj"], steps=3, init_rank=4, target_rank=2),
    )
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert_equal(meshed.train(mesh, method, chunk_tokens=5), meshed.train(method=method))


def test_every_other_method_on_a_mesh_trains_to_the_weights_of_one_device():
    method = peft.chain(
        peft.loftq(["down_proj"], rank=4, format="int4", group=8, nested=False),
        peft.hira(["q_proj"], rank=4),
        peft.ia3(["k_proj", "gate_proj"], feedforward=["gate_proj"]),
        peft.boft(["v_proj"], block_size=4, factors=2),
        peft.delta_lora(["o_proj"], rank=4, start_steps=1),
        peft.relora(["o_proj"], rank=4, every_steps=2, prune="reset"),
        peft.lokr(["gate_proj"], rank=2, decompose_both=True),
        peft.miss(["up_proj"], rank=8),
        peft.miss(["up_proj"], rank=8, form="bat", name="bat"),
        peft.bitfit(),
        peft.value_head(),
        peft.p_tuning(3, hidden_size=8, encoder="lstm"),
    )

    def loss_fn(scores, batch):
        mean, metrics = losses.sft(scores, batch)
        return mean + types.Mean(jnp.sum(jnp.square(scores.values - 1) * batch.loss_mask), jnp.zeros(())), metrics

    options = dict(method=method, preset="tiny-qwen2", loss_fn=loss_fn, outputs=("logps", "values"))
    run = meshed.train(sharding.make_mesh(data=2, fsdp=2, tensor=2), chunk_tokens=5, **options)
    assert_equal(run, meshed.train(**options))
    before = tree.flatten(meshed.start(method, "tiny-qwen2")[1])
    assert {path.split("/")[0] for path, leaf in run.trained.items() if not np.array_equal(leaf, before[path])} == set(run.state.trainable)


def test_adapters_over_a_quantised_base_train_on_a_mesh_to_the_weights_of_one_device():
    formats = quant.nf4(["q_proj"], group=8), quant.uint4(["down_proj"], group=8)
    low_rank = peft.lora(["q_proj", "down_proj"], rank=4, init="gaussian")
    method = peft.chain(*formats, low_rank, peft.prompt_tuning(4))
    run = meshed.train(sharding.make_mesh(data=2, fsdp=2, tensor=2), method, chunk_tokens=5)
    assert_equal(run, meshed.train(method=method))
    codes = tree.flatten(run.frozen)["layers/mlp/down_proj/kernel"].codes
    assert codes.sharding.shard_shape(codes.shape)[1:] == (codes.shape[1] // 2, codes.shape[2] // 2)


def test_accumulation_and_rematerialisation_change_nothing_on_a_mesh(alone):
    assert_equal(meshed.train(sharding.make_mesh(data=2, fsdp=2, tensor=2), accumulation=2, remat="full"), alone)


def test_a_mesh_of_one_device_is_no_mesh(alone):
    assert meshed.train(sharding.make_mesh(devices=jax.devices()[:1])).losses == alone.losses


def test_no_device_holds_more_than_its_shard_of_the_frozen_tree(cube):
    held = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(cube.frozen):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    matrices = tree.num_bytes({path: leaf for path, leaf in tree.flatten(cube.frozen).items() if path.endswith("kernel")})
    assert set(held.values()) == {matrices // 4}  # fsdp x tensor; the norms are trained, so they are not in it


def test_the_state_leaves_the_step_as_it_came(cube):
    for (path, leaf), where in zip(sharding.rules.paths(cube.state), jax.tree.leaves(cube.where), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), path
    a = cube.state.opt_state[0].trace["lora"]["layers"]["mlp"]["down_proj"]["kernel"]["a"]
    assert a.sharding.shard_shape(a.shape) == (2, 32, 4)  # a moment, split over tensor as its factor


def test_later_steps_compile_nothing(cube, caplog):
    state = jax.tree.map(lambda x: x + 0 if x.dtype == np.float32 else x.copy(), cube.state)
    batch = meshed.my_rows(meshed.STEPS, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    with jax.log_compiles():
        cube.step(state, cube.frozen, batch)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_a_run_resumes_on_another_mesh(cube, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(cube.state, Record(3, {}))
    checkpoints.wait()
    where = sharding.state_shardings(cube.state, sharding.make_mesh(data=1, fsdp=8))
    state, _ = checkpoints.restore(sharding.abstract(cube.state, where))
    for (path, leaf), there, saved in zip(sharding.rules.paths(state), jax.tree.leaves(where), jax.tree.leaves(cube.state), strict=True):
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim), path
        if path != "key":
            np.testing.assert_array_equal(leaf, saved, err_msg=path)


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    outputs = [tmp_path / f"{n}.npz" for n in range(2)]
    root = pathlib.Path(__file__).parents[2]
    commands = [[sys.executable, "-m", "tests.meshed", str(n), "2", port, str(output)] for n, output in enumerate(outputs)]
    workers = [subprocess.Popen(c, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    one = meshed.train(sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]))
    for output in outputs:
        with np.load(output) as two:
            np.testing.assert_allclose(two["losses"], one.losses, rtol=1e-6)
            for path, leaf in one.trained.items():
                np.testing.assert_allclose(two[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)
