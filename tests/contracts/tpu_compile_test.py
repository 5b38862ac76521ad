"""Steps compile and fit on TPU pods, without a TPU.

libtpu compiles for a described topology on a CPU host. It tells how much memory a device needs, as on the hardware, and which program
runs; it tells nothing of speed. The lowest optimisation level is six times faster to compile and needs slightly more memory.
"""

import dataclasses
import math
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from ftjax import losses, models, optimizers, peft, scoring, sharding
from ftjax.train import init_state, make_train_step
from ftjax.types import Batch

HBM = 15.75 * 2**30  # of a v5e chip, as libtpu has it
CASES = {
    "quickstart": dict(name="smollm2-135m", axes={}, rows=16, time=512, remat="none"),
    "llama_8b": dict(name="llama-3-8b", axes={"data": 1, "fsdp": 4, "tensor": 4}, rows=16, time=2048, remat="full"),
}


@pytest.fixture(scope="module")
def v5e():
    """Sixteen v5e chips that do not exist."""
    pytest.importorskip("libtpu")
    described = {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3"}
    # Nothing runs, so a second process that compiles does no harm; without this libtpu holds a lock file in the temporary folder.
    os.environ.update(described, ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    jax.config.update("jax_optimization_level", "O0")
    yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    jax.config.update("jax_optimization_level", "UNKNOWN")


def compiled_step(mesh, *, name, rows, time, remat):
    """Return the compiled LoRA step of a preset in bfloat16, and its config; only shapes exist."""
    config = dataclasses.replace(models.preset(name), dtype="bfloat16")
    model = sharding.on_mesh(models.build(config, remat=remat), mesh)
    method = peft.lora("all-linear", rank=16)
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=10)
    key = jax.random.key(0)
    frozen, trainable = jax.eval_shape(lambda key: method.init(key, model.init(key)), key)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), key, trainable)
    where = sharding.state_shardings(state, mesh)
    shards = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    step = make_train_step(partial(scoring.score, model, batch_shards=shards), method, losses.sft, optimizer, state_sharding=where)
    ids, mask = (jax.ShapeDtypeStruct((rows, time), dtype, sharding=sharding.batch_sharding(mesh)) for dtype in (jnp.int32, jnp.float32))
    frozen = sharding.abstract(frozen, sharding.shardings(frozen, mesh))
    return step.lower(sharding.abstract(state, where), frozen, Batch(ids, mask, ids, ids)).compile(), config


def shapes(hlo: str, pattern: str = "") -> set[tuple[int, ...]]:
    """Return the shapes that stand before `pattern` in the lines of a program."""
    lines = [line for line in hlo.splitlines() if re.search(pattern, line)]
    found = (
        match for line in lines for match in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", re.split(pattern, line)[0] if pattern else line)
    )
    return {tuple(map(int, match.split(","))) for match in found}


@pytest.mark.parametrize("case", CASES)
def test_the_step_fits_and_moves_only_what_it_must(case, v5e, capsys):
    options = dict(CASES[case])
    mesh = sharding.make_mesh(**options.pop("axes"), devices=v5e)
    compiled, config = compiled_step(mesh, **options)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    with capsys.disabled():
        parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "peak": memory.peak_memory_in_bytes}
        print(f"\n{case} on v5e 4x4, per device: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items()))
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < HBM

    vocabulary = {config.vocab_size, config.vocab_size // mesh.shape["tensor"]}
    my_tokens = options["rows"] // math.prod(mesh.shape[axis] for axis in sharding.ROWS) * options["time"]
    of_tokens = [s for s in shapes(hlo) if s[-1] in vocabulary and math.prod(s[:-1]) >= my_tokens and config.hidden_size not in s]
    assert not of_tokens, "the logits of all tokens are held at once"

    moved = shapes(hlo, r" (all-gather|all-reduce|all-to-all|reduce-scatter)(-start)?\(")
    matrices = {config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim}
    stacked = {s for s in moved if len(s) == 3 and s[0] == config.num_hidden_layers and set(s[1:]) <= matrices}
    assert not stacked, "a stack of layers is gathered whole"
    assert not {s for s in moved if s[:2] == (options["rows"], options["time"])}, "rows leave their device"
    # Two scans over layers and one over chunks: attention has its accelerator form, without a loop over heads.
    assert len(re.findall(r" while\(", hlo)) == 3


def test_without_gathering_leaves_rows_do_leave_their_device(v5e, monkeypatch):
    """What `on_mesh` is for: by itself the compiler splits activations over `fsdp` and moves every row everywhere."""
    monkeypatch.setattr(sharding, "on_mesh", lambda model, mesh: model)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=4, devices=v5e)
    hlo = compiled_step(mesh, name="tiny-qwen3", rows=16, time=128, remat="none")[0].as_text()
    assert {s for s in shapes(hlo, r" (all-gather|all-reduce)(-start)?\(") if s[:2] == (16, 128)}
