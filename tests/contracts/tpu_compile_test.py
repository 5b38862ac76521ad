"""Steps compile and fit on TPU pods, without a TPU.

libtpu compiles for a described topology on a CPU host. It tells how much memory a device needs, as on the hardware, and which program
runs; it tells nothing of speed. The lowest optimisation level is six times faster to compile and needs slightly more memory.
"""

import dataclasses
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax import models, quant, sharding, tree, weights
from ftjax.cli import abstract
from ftjax.cli import config as configs
from ftjax.quant.permuted import PermutedWeight

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
HBM = 15.75 * 2**30  # of a v5e chip, as libtpu has it
CASES = {
    "quickstart": {"data.batch_size": 64},  # on each chip what the config has on one device
    "sft_llama3_8b_lora": {"mesh.fsdp": 4, "mesh.tensor": 4},
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


def compiled_step(spec, fields, devices):
    """Return the compiled step that `ftjax train` takes with a config, the config, and its mesh."""
    config = configs.load(str(FOLDER / spec))
    config.update_from_flattened_dict({"model.dtype": "bfloat16", **fields})  # what "auto" is on a TPU: this process runs on a CPU
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    step = abstract.built(config, mesh)
    return step.train_step.lower(step.state, step.frozen, step.batch).compile(), config, mesh


def shapes(hlo: str, pattern: str = "") -> set[tuple[int, ...]]:
    """Return the shapes that stand before `pattern` in the lines of a program."""
    lines = [line for line in hlo.splitlines() if re.search(pattern, line)]
    found = (
        match for line in lines for match in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", re.split(pattern, line)[0] if pattern else line)
    )
    return {tuple(map(int, match.split(","))) for match in found}


@pytest.mark.parametrize("name", CASES)
def test_the_step_of_a_config_fits_and_moves_only_what_it_must(name, v5e, capsys):
    compiled, config, mesh = compiled_step(f"{name}.py", CASES[name], v5e)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    with capsys.disabled():
        parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "peak": memory.peak_memory_in_bytes}
        print(f"\n{name} on v5e 4x4, per device: " + ", ".join(f"{part} {size / 2**30:.2f} GiB" for part, size in parts.items()))
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < HBM

    model, rows, tokens = models.preset(config.model.preset), config.data.batch_size, config.data.max_tokens
    vocabulary = {model.vocab_size, model.vocab_size // mesh.shape["tensor"]}
    my_tokens = rows // math.prod(mesh.shape[axis] for axis in sharding.ROWS) * tokens
    of_tokens = [s for s in shapes(hlo) if s[-1] in vocabulary and math.prod(s[:-1]) >= my_tokens and model.hidden_size not in s]
    assert not of_tokens, "the logits of all tokens are held at once"

    moved = shapes(hlo, r" (all-gather|all-reduce|all-to-all|reduce-scatter)(-start)?\(")
    matrices = {model.hidden_size, model.intermediate_size, model.num_key_value_heads * model.head_dim}
    stacked = {s for s in moved if len(s) == 3 and s[0] == model.num_hidden_layers and set(s[1:]) <= matrices}
    assert not stacked, "a stack of layers is gathered whole"
    assert not {s for s in moved if s[:2] == (rows, tokens)}, "rows leave their device"
    # Two scans over layers and one over chunks: attention has its accelerator form, without a loop over heads.
    assert len(re.findall(r" while\(", hlo)) == 3


def test_without_gathering_leaves_rows_do_leave_their_device(v5e, monkeypatch):
    """What `on_mesh` is for: by itself the compiler splits activations over `fsdp` and moves every row everywhere."""
    monkeypatch.setattr(sharding, "on_mesh", lambda model, mesh: model)
    fields = {"mesh.fsdp": 4, "mesh.tensor": 4, "data.batch_size": 16}
    hlo = compiled_step("sft_qwen3_4b_lora.py:smoke", fields, v5e)[0].as_text()
    assert {s for s in shapes(hlo, r" (all-gather|all-reduce)(-start)?\(") if s[:2] == (16, 128)}


@pytest.mark.parametrize(
    ("topology", "format", "rows", "dtype"),
    [
        ("v5e:2x2", "nf4", 2048, jnp.bfloat16),
        ("v5e:2x2", "int8", 16, jnp.float32),
        ("v5e:2x2", "uint8", 2048, jnp.bfloat16),
        ("v5p:2x2x1", "uint4", 2048, jnp.bfloat16),
        ("v5p:2x2x1", "nf4", 16, jnp.bfloat16),
        ("v6e:2x2", "int4", 2048, jnp.bfloat16),
        ("v6e:2x2", "fp4", 16, jnp.bfloat16),
    ],
)
def test_products_with_packed_matrices_compile_and_hold_nothing_but_packed_bytes(v5e, topology, format, rows, dtype):
    """In training and in decoding, forwards and backwards."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    where = NamedSharding(Mesh(np.array(devices[:1]), "one"), P())
    w = jax.eval_shape(lambda w: quant.quantize(w, format), jax.ShapeDtypeStruct((1024, 1024), dtype))
    w = dataclasses.replace(w, implementation="tpu")
    x = jax.ShapeDtypeStruct((rows, 1024), dtype)
    x, w = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree) for tree in (x, w))
    compiled = jax.jit(lambda x, y, w: (weights.dot(x, w), weights.dot_transposed(y, w))).lower(x, x, w).compile()
    memory = compiled.memory_analysis()
    packed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))
    assert memory.temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes == 2 * rows * 1024 * jnp.dtype(dtype).itemsize + packed
    assert (1024, 1024) not in shapes(compiled.as_text())


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_a_matrix_of_sorted_rows_is_multiplied_by_the_kernel_on_a_mesh(v5e, name):
    """By columns and by rows, forwards and backwards."""
    mesh, path = sharding.make_mesh(data=2, fsdp=2, tensor=4, devices=v5e), f"layers/mlp/{name}/kernel"
    base = jax.eval_shape(lambda w: quant.quantize(w, "uint4"), jax.ShapeDtypeStruct((2, 1024, 1024), jnp.bfloat16))
    params = tree.unflatten({path: PermutedWeight(base, jax.ShapeDtypeStruct((2, 1024), jnp.int32))})
    params = sharding.abstract(params, sharding.shardings(params, mesh))
    x = jax.ShapeDtypeStruct((16, 128, 1024), jnp.bfloat16, sharding=sharding.batch_sharding(mesh, ndim=3))

    def both(x, y, params):
        w = jax.tree.map(lambda array: array[0], tree.flatten(sharding.leaves_on_mesh(params, mesh))[path])
        out, pullback = jax.vjp(lambda x: weights.dot(x, w), x)
        return out, pullback(y)[0]

    hlo = jax.jit(both).lower(x, x, params).compile().as_text()
    assert re.search(r"%int4_product[.\d]* = ", hlo) and re.search(r"%int4_product_transposed[.\d]* = ", hlo)


def test_a_quantised_base_is_multiplied_by_the_kernel_and_never_dense(v5e):
    """Every product forwards, computed again and backwards; the packed layers lie over `fsdp` and `tensor`."""
    fields = {"model.preset": "llama-3.2-1b", "model.remat": "full", "data.batch_size": 16, "data.max_tokens": 24}
    compiled, config, mesh = compiled_step("qlora_llama3_8b.py", {**fields, "mesh.fsdp": 4, "mesh.tensor": 4}, v5e)
    hlo, model = compiled.as_text(), models.preset(config.model.preset)
    calls = re.findall(r"%(int4_product(?:_transposed)?)[.\d]* = bf16\[[\d,]+\].* custom-call\(", hlo)
    assert calls.count("int4_product") >= 7 and calls.count("int4_product_transposed") >= 7
    heads, keys = (count * model.head_dim for count in (model.num_attention_heads, model.num_key_value_heads))
    sizes = {size // parts for size in (model.hidden_size, model.intermediate_size, heads, keys) for parts in (1, 4)}
    layers = {s for s in shapes(hlo) if len(s) > 1 and {*s[-2:]} <= sizes and math.prod(s[:-2]) in (1, model.num_hidden_layers)}
    assert not layers, "a matrix exists as numbers"
