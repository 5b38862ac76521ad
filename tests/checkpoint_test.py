"""Checkpoints come back bit for bit or not at all."""

import json
import multiprocessing
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ftjax import checkpoint, manifest, optimizers, peft, tree
from ftjax.checkpoint import Checkpoints, Record
from ftjax.train import init_state
from ftjax.types import TrainState


def make_state(key, step=0, width=4):
    trainable = {"lora": {"layers": {"q": {"a": jax.random.normal(key, (2, width, 2)), "b": jnp.zeros((2, 2, 4))}}}}
    optimizer = optimizers.build("adamw", learning_rate=0.1, steps=10, schedule_name="linear")
    state = init_state(key, trainable, peft.chain(), optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, opt_state = optimizer.update(trainable, state.opt_state, trainable)
    return TrainState(jnp.asarray(step, jnp.int32), key, optax.apply_updates(trainable, updates), opt_state)


def record(step, **metrics):
    return Record(step=step, config={"seed": 1}, metrics=metrics)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype and x.sharding == y.sharding and np.array_equal(x, y)


@pytest.fixture
def saved(tmp_path, key):
    """Two checkpoints, of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        checkpoints.save(make_state(key, step), record(step, loss=1.0 / step))
    checkpoints.wait()
    return checkpoints


def test_a_state_comes_back_bit_for_bit(saved, key):
    state, found = saved.restore(make_state(jax.random.key(9)))
    assert_same(state, make_state(key, 20))
    assert found == record(20, loss=0.05)


def test_a_relative_folder_will_do(tmp_path, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("runs/one/checkpoints")
    checkpoints.save(make_state(key, 10), record(10, loss=0.1))
    checkpoints.wait()
    assert_same(Checkpoints("runs/one/checkpoints").restore(make_state(key))[0], make_state(key, 10))


def test_an_abstract_state_is_restored_onto_its_shardings(tmp_path, key):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(make_state(key, 3, width=8), everywhere)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, record(3))

    def spec(path, x):
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", None))
        sharding = split if x.shape == (2, 8, 2) else everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    restored, _ = checkpoints.restore(jax.tree_util.tree_map_with_path(spec, state))
    a = tree.flatten(restored.trainable)["lora/layers/q/a"]
    assert len({shard.device for shard in a.addressable_shards}) == 8 and a.addressable_shards[0].data.shape == (2, 1, 2)
    assert np.array_equal(a, tree.flatten(state.trainable)["lora/layers/q/a"])


def test_a_save_is_not_disturbed_by_donating_the_state(tmp_path, key):
    checkpoints = Checkpoints(tmp_path)
    state = jax.tree.map(jnp.copy, make_state(key, 1))
    checkpoints.save(state, record(1))
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros_like(x), s), donate_argnums=0
    )
    step(state)
    assert_same(checkpoints.restore(make_state(key, 1))[0], make_state(key, 1))


def test_the_last_two_and_the_best_are_kept(tmp_path, key):
    checkpoints = Checkpoints(tmp_path, keep=2, best_metric="loss")
    for step, loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, 2.0)):
        checkpoints.save(make_state(key, step), record(step, loss=loss))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best() == 2
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000004", "00000005"]


def test_accuracy_is_better_high_and_perplexity_low():
    assert all(checkpoint.improves(0.9, 0.8, more) for more in ("accuracy", "rewards/margin", "agreement", "reward"))
    less = ("loss", "perplexity", "nll", "kl", "repetition", base.distilled().checkpoint.best_metric)
    assert all(checkpoint.improves(0.8, 0.9, name) and not checkpoint.improves(0.9, 0.8, name) for name in less)


def largest_file(checkpoints, step):
    files = [p for p in pathlib.Path(checkpoints.folder, f"{step:08d}", "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_an_error_that_names_it(saved, key, damage):
    path = largest_file(saved, 20)
    DAMAGES[damage](path)
    with pytest.raises(checkpoint.CheckpointError, match=path.name):
        saved.restore(make_state(key))


@pytest.mark.parametrize("name", [checkpoint.RECORD, manifest.MANIFEST])
def test_a_damaged_record_or_manifest_is_an_error_that_names_it(saved, key, name):
    path = saved.folder / "00000020" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(checkpoint.CheckpointError, match=name):
        saved.restore(make_state(key))


def test_falling_back_happens_only_when_told(saved, key, capsys):
    for _ in range(2):  # the second time a damaged one lies aside already
        flip(largest_file(saved, 20))
        state, found = saved.restore(make_state(key), fall_back=True)
        assert found.step == 10 and "going back" in capsys.readouterr().out
        assert_same(state, make_state(key, 10))
        saved.set_aside(after=10)
        assert sorted(os.listdir(saved.folder)) == ["00000010", "00000020.damaged"]
        saved.save(make_state(key, 20), record(20))  # the damaged one is out of the way
        assert saved.restore(make_state(key))[1].step == 20


@pytest.mark.parametrize("name", [checkpoint.RECORD, manifest.MANIFEST])
def test_the_last_record_is_the_last_that_its_manifest_vouches_for(saved, name):
    assert saved.last_record() == record(20, loss=0.05)
    path = saved.folder / "00000020" / name
    path.write_text(path.read_text().replace("0", "1"))  # JSON still, of other numbers
    with pytest.raises(checkpoint.CheckpointError, match=r"00000020/record.json was changed .* set --config.checkpoint.fall_back"):
        saved.last_record()
    assert saved.last_record(fall_back=True) == record(10, loss=0.1)
    (saved.folder / "00000010" / checkpoint.RECORD).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="00000010/record.json is missing"):
        saved.last_record(fall_back=True)


def test_a_run_without_a_checkpoint_has_no_last_record(tmp_path):
    assert Checkpoints(tmp_path).last_record() is None


def test_reading_changes_nothing_on_the_disk(saved, key, tmp_path):
    flip(largest_file(saved, 20))
    reader = Checkpoints(saved.folder)
    assert reader.restore(make_state(key), fall_back=True)[1].step == 10 and reader.best() == 20
    assert sorted(os.listdir(saved.folder)) == ["00000010", "00000020"]
    assert Checkpoints(tmp_path / "none").steps() == [] and not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["{", "{}"])
def test_an_unreadable_record_is_named_and_keeps_nothing_from_being_saved(saved, key, capsys, text):
    (saved.folder / "00000010" / checkpoint.RECORD).write_text(text)
    assert saved.best() == 20 and "00000010/record.json cannot be read" in capsys.readouterr().out
    saved.save(make_state(key, 30), record(30))
    saved.wait()
    assert saved.steps() == [20, 30]


def test_a_checkpoint_without_a_manifest_was_never_finished(saved, key):
    (saved.folder / "00000020" / manifest.MANIFEST).unlink()
    assert saved.steps() == [10]
    assert saved.restore(make_state(key))[1].step == 10
    saved.save(make_state(key, 20), record(20))
    assert saved.restore(make_state(key))[1].step == 20


def test_another_structure_is_refused(saved, key):
    with pytest.raises(checkpoint.CheckpointError, match=r"another state(.|\n)*float32\[2, 4, 2\] in the checkpoint, float32\[2, 8, 2\]"):
        saved.restore(make_state(key, width=8))


def test_no_checkpoint_is_an_error(tmp_path, key):
    with pytest.raises(checkpoint.CheckpointError, match="no complete checkpoint"):
        Checkpoints(tmp_path / "none").restore(make_state(key))


def test_a_failed_save_is_raised_in_the_main_thread(tmp_path, key, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(path, text):
        raise OSError("disk full")

    monkeypatch.setattr(manifest, "write_whole", full)
    checkpoints.save(make_state(key), record(1))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    assert checkpoints.steps() == []


def test_a_record_is_plain_json(saved):
    stored = json.loads((saved.folder / "00000020" / checkpoint.RECORD).read_text())
    assert stored.pop("leaves")["trainable/lora/layers/q/a"] == "float32[2, 4, 2]"
    assert stored == {"step": 20, "config": {"seed": 1}, "metrics": {"loss": 0.05}, "memory": {}}


def _hold(workdir, ready):
    with checkpoint.lock(workdir):
        ready.set()
        time.sleep(60)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"), checkpoint.lock(tmp_path):
        pass
    holder.kill()
    holder.join()
    with checkpoint.lock(tmp_path):  # nothing stale is left
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
