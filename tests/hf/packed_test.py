"""What is packed as it is read is what packing all of it gives, and the dense matrix is never there."""

import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, quant, sharding, tree, weights
from ftjax.hf import export, folder, load, names
from ftjax.hf.folder import Checkpoint
from ftjax.hf.lazy import LazyTensor, from_array
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.types import Model

UP, DOWN, HEAD = "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel", "lm_head/kernel"
SHAPES = {"embed_tokens/kernel": (12, 16), UP: (3, 16, 48), DOWN: (3, 48, 16), HEAD: (16, 12)}
BOTH = peft.chain(quant.nf4("all-linear", group=16), quant.int8([HEAD.split("/")[0]]))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """A folder of a model whose rows are whole blocks of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    wide = models.build(models.config_from_hf(models.PRESETS["tiny-qwen2"] | sizes | {"tie_word_embeddings": False}))
    out = tmp_path_factory.mktemp("dense") / "model"
    return str(export.export_model(out, wide, jax.jit(wide.init)(jax.random.key(0)), byte_tokenizer()))


def model(shapes=SHAPES):
    return Model(None, lambda key: tree.unflatten({path: jnp.zeros(shape) for path, shape in shapes.items()}), None, None, None)


def checkpoint(dtype=np.float32, change=lambda name, array: array):
    random = np.random.default_rng(0)
    arrays = {n: random.standard_normal(names.leaf_shape(p, s)).astype(dtype) for p, s in SHAPES.items() for n in names.tensors(p, s)}
    return Checkpoint("test", {}, {name: from_array(change(name, array)) for name, array in arrays.items()})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_streamed_matrix_has_the_bits_of_the_whole_one(dtype):
    dense = load.load_params(checkpoint(), model(), dtype=dtype)
    expected, _ = BOTH.init(jax.random.key(0), dense)
    found = load.load_params(checkpoint(), model(), dtype=dtype, quantizer=BOTH)
    assert isinstance(found["lm_head"]["kernel"], quant.QuantizedWeight) and jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    again, _ = BOTH.init(jax.random.key(0), found)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True))


def test_a_streamed_matrix_lies_on_a_mesh_as_its_rules_say():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    placed = load.load_params(checkpoint(), model(), quantizer=BOTH, place=sharding.placement(mesh))
    jax.tree.map(np.testing.assert_array_equal, placed, load.load_params(checkpoint(), model(), quantizer=BOTH))
    up, down = (tree.flatten(placed)[path].codes for path in (UP, DOWN))
    assert up.sharding.shard_shape(up.shape) == (3, 4, 12)  # one scale for all rows may be in two places …
    assert down.sharding.shard_shape(down.shape) == (3, 24, 8)  # … and three groups of rows are not parted over four


def test_the_host_holds_packed_bytes_and_a_layer_and_the_device_4_127_bits_a_number():
    shapes = {UP: (16, 512, 1024), DOWN: (16, 1024, 512)}

    def random(shape):
        return LazyTensor(shape, np.dtype(np.float32), lambda index: np.random.default_rng(0).random(shape, np.float32)[index])

    tensors = {n: random(names.leaf_shape(p, s)) for p, s in shapes.items() for n in names.tensors(p, s)}
    tracemalloc.start()
    try:
        params = load.load_params(Checkpoint("test", {}, tensors), model(shapes), quantizer=quant.nf4())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    dense = sum(4 * np.prod(shape) for shape in shapes.values())
    held = sum(shard.data.nbytes for array in jax.tree.leaves(params) for shard in array.addressable_shards)
    assert 8 * held / (dense / 4) == pytest.approx(4.127, abs=1e-3) and peak < held + 0.15 * dense


@pytest.mark.parametrize(
    ("layout", "quantizer", "dtype"),
    [
        ("auto", quant.nf4(exclude=".*down_proj/kernel"), "auto"),
        ("bitsandbytes", quant.fp4(nested=False), "bfloat16"),
        ("bitsandbytes", quant.int8(), "bfloat16"),
        ("gptq", quant.int4(group=32), "float16"),
        ("ftjax", peft.chain(quant.int4(group=16, nested=True), quant.int8([HEAD.split("/")[0]])), "float32"),
        ("ftjax", quant.quantized("uint4", group=32), "auto"),
    ],
)
def test_a_folder_that_is_quantised_in_passing_is_that_of_the_whole_tree(layout, quantizer, dtype, dense_folder, tmp_path):
    one, two = (
        export.export_model(tmp_path / opened.__name__, found.model, found.params, found.tokenizer, layout=layout, shard_bytes=20_000)
        for opened in (load.load, load.lazy)
        for found in [opened(dense_folder, dtype=dtype, quantizer=quantizer)]
    )
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()} and len(list(two.glob("*.safetensors"))) > 2
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())


@pytest.mark.parametrize("layout", ["gptq", "ftjax"])
def test_where_a_tensor_cannot_be_packed_no_folder_is_left(layout, dense_folder, tmp_path):
    found = folder.read(pathlib.Path(dense_folder))
    last = "model.layers.1.mlp.down_proj.weight"  # is read when most is written
    bad = found._replace(tensors=found.tensors | {last: from_array(np.full(found.tensors[last].shape, np.nan, np.float32))})
    wanted = models.build(load.config_of(bad))
    params = load.lazy_params(bad, wanted, quantizer=quant.int4(group=32))
    with pytest.raises(ValueError, match=r"'layers/mlp/down_proj/kernel', layer 1, holds 8,192 numbers that are not finite"):
        export.export_model(tmp_path / "out", wanted, params, None, layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_before_training(value):
    def spoil(name, array):
        if name == "model.layers.1.mlp.up_proj.weight":
            array[3, 5] = value
        return array

    with pytest.raises(ValueError, match=r"'layers/mlp/up_proj/kernel', layer 1, holds 1 numbers that are not finite.*\[\[5, 3\]\]"):
        load.load_params(checkpoint(change=spoil), model(), quantizer=BOTH)


def test_zeros_are_no_error_and_stay_zeros():
    found = load.load_params(
        checkpoint(change=lambda name, array: array * (not name.startswith("model.layers.1."))), model(), quantizer=BOTH
    )
    for path in (UP, DOWN):
        assert not np.any(weights.materialize(tree.flatten(found)[path])[1])


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (quant.nf4(group=32), r"nf4: 'layers/mlp/down_proj/kernel'.*48 rows .* groups of 32.*exclude it"),
        (quant.nf4(["q_proj"]), "no module is named 'q_proj'; nearest"),
        (peft.chain(quant.nf4(group=16), quant.int8("layers/.*")), "is packed already, nf4 by 16 rows with nested scales, and not int8"),
    ],
)
def test_what_cannot_be_packed_is_said_before_anything_is_read(quantizer, message):
    def unread(tensor):
        return LazyTensor(tensor.shape, tensor.dtype, lambda index: pytest.fail("it was read"))

    untouched = checkpoint()
    untouched = untouched._replace(tensors={name: unread(tensor) for name, tensor in untouched.tensors.items()})
    with pytest.raises(ValueError, match=message):
        load.load_params(untouched, model(), quantizer=quantizer)
