"""Packed matrices go out in bitsandbytes', GPTQ's or our own files and come back bit for bit; a flipped bit does not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models, peft, sharding, tree
from ftjax.hf import checksums, export, folder, load, quantized, write
from ftjax.hf.lazy import LazyTensor, from_array
from ftjax.quant import SPECS, NestedScales, QuantizedWeight
from ftjax.quant.permuted import PermutedWeight

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def model():
    return models.build(models.config_from_hf(models.PRESETS["tiny-qwen2"] | SIZES | {"tie_word_embeddings": False}))


def random_packed(shape, format, group, *, nested=False, permuted=False, zeroed=True, seed=0):
    """A matrix of random codes and scales, in memory of the host."""
    rng = np.random.default_rng(seed)
    (layers, i, o), bits = shape, SPECS[format].bits
    n = i // (group or i)
    codes = rng.integers(0, 256, (layers, i * bits // 8, o), np.uint8)
    scales = rng.uniform(0.01, 1, (layers, n, o)).astype(np.float16).astype(np.float32)
    if nested:
        large, mean = rng.uniform(0.01, 1, (layers, -(-o * n // 256))), rng.uniform(0.01, 1, layers)
        scales = NestedScales(rng.integers(0, 256, (layers, o, n), np.uint8), large.astype(np.float32), mean.astype(np.float32))
    low, high = {"uint4": (0, 16), "uint8": (-128, 128)}.get(format, (0, 1))
    zeros = rng.integers(low, high, (layers, n, o)).astype(np.float32) if format in ("uint4", "uint8") and zeroed else None
    weight = QuantizedWeight(codes.view(np.int8) if bits == 8 else codes, scales, zeros, format, "bfloat16")
    order = np.argsort(rng.permuted(np.tile(np.arange(i) // (group or i), (layers, 1)), axis=1), axis=1, kind="stable")
    return PermutedWeight(weight, order.astype(np.int32)) if permuted else weight


def random_params(model, format, group, **options):
    rng = np.random.default_rng(1)
    shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    leaves = {
        path: random_packed(leaf.shape, format, group, **options)
        if path.endswith("_proj/kernel")
        else rng.standard_normal(leaf.shape).astype(jnp.bfloat16)
        for path, leaf in shapes.items()
    }
    return jax.tree.map(jnp.asarray, tree.unflatten(leaves))


def again(out):
    checkpoint = folder.read(out)
    return load.load_params(checkpoint, models.build(load.config_of(checkpoint)))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), found, expected)


@pytest.mark.parametrize(
    ("layout", "format", "group", "options", "method"),
    [
        ("auto", "nf4", 64, {"nested": True}, "bitsandbytes"),
        ("auto", "fp4", 64, {}, "bitsandbytes"),
        ("bitsandbytes", "int8", None, {}, "bitsandbytes"),
        ("gptq", "int4", 32, {}, "gptq"),
        ("gptq", "int4", None, {}, "gptq"),
        ("gptq", "uint4", 32, {}, "gptq"),
        ("gptq", "uint4", 32, {"permuted": True}, "gptq"),
        ("gptq", "uint8", 32, {"permuted": True}, "gptq"),
        ("gptq", "uint8", 32, {"zeroed": False}, "gptq"),
        ("auto", "uint4", 32, {"permuted": True}, "ftjax"),
        ("auto", "int4", 32, {"nested": True}, "ftjax"),
        ("auto", "nf4", 32, {}, "ftjax"),
        ("auto", "int8", 32, {}, "ftjax"),
    ],
)
def test_what_goes_out_comes_back_bit_for_bit(tmp_path, model, layout, format, group, options, method):
    params = random_params(model, format, group, **options)
    out = export.export_model(tmp_path / "out", model, params, None, layout=layout)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == method
    found = again(out)
    if method == "gptq":  # which says nothing of the dtype, but by that of its scales
        kernels = [path for path in tree.flatten(found) if path.endswith("_proj/kernel")]
        found = tree.replace(found, {path: quantized.in_dtype(tree.flatten(found)[path], "bfloat16") for path in kernels})
    assert_equal(found, params)


def test_the_modules_left_dense_are_named(tmp_path, model):
    out = export.export_model(tmp_path / "out", model, random_params(model, "nf4", 64), None, layout="auto")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head"] and config["load_in_4bit"] and not config["bnb_4bit_use_double_quant"]


def test_scales_that_float16_cannot_hold_are_float32_in_gptqs_files(tmp_path, model):
    params = random_params(model, "int4", 32)
    path = "layers/mlp/up_proj/kernel"
    odd = dataclasses.replace(tree.flatten(params)[path], scales=jnp.full((2, 2, 128), 1 / 3))
    tensors = folder.file_tensors(
        export.export_model(tmp_path / "out", model, tree.replace(params, {path: odd}), None, layout="gptq") / "model.safetensors"
    )
    dtypes = {name.split(".")[-2]: tensor.dtype.name for name, tensor in tensors.items() if name.endswith("scales")}
    assert dtypes["up_proj"] == "float32" and dtypes["down_proj"] == "float16"
    assert_equal(tree.flatten(again(tmp_path / "out"))[path].scales, odd.scales)


def test_dense_is_still_dense(tmp_path, model):
    params, path = random_params(model, "uint4", 32), "layers/mlp/down_proj/kernel"
    dense = {path: jnp.zeros(leaf.shape) for path, leaf in tree.flatten(params).items() if isinstance(leaf, QuantizedWeight)}
    packed = tree.flatten(params)[path]
    out = export.export_model(tmp_path / "out", model, tree.replace(params, dense | {path: packed}), None)
    assert "quantization_config" not in json.loads((out / "config.json").read_text()) and not (out / checksums.FILE).exists()
    np.testing.assert_array_equal(tree.flatten(again(out))[path], packed.materialize())


@pytest.mark.parametrize("layout", ["bitsandbytes", "ftjax"])
def test_nf4_with_nested_scales_takes_4_127_bits_a_number_on_disk(layout, tmp_path):
    """Header, tables and all."""
    i = o = 4096
    weight = jax.tree.map(lambda array: from_array(array[0]), random_packed((1, i, o), "nf4", 64, nested=True))
    tensors = {f"up.{part}": tensor for part, tensor in quantized.LAYOUTS[layout].write(weight).items()}
    entries = [write.Entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write.write_shards(tmp_path, entries, (tensor.read() for tensor in tensors.values()))
    (file,) = tmp_path.iterdir()
    assert 8 * file.stat().st_size / (i * o) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize(
    ("layout", "leaf", "message"),
    [
        ("bitsandbytes", random_packed((1, 64, 8), "int4", 32), "nf4, fp4 and int8, not int4"),
        ("bitsandbytes", random_packed((1, 64, 8), "nf4", 32), "blocks of 64, 128, .* not of 32"),
        ("bitsandbytes", random_packed((1, 64, 8), "int8", 32), "one plain scale for an output"),
        ("bitsandbytes", random_packed((1, 64, 8), "uint4", 32, permuted=True), "lie side by side only"),
        ("gptq", random_packed((1, 64, 8), "nf4", 32), "int4, uint4 and uint8, not nf4"),
        ("gptq", random_packed((1, 64, 8), "int4", 32, nested=True), "no nested scales"),
        ("gptq", random_packed((1, 64, 12), "int4", 32), "64 x 12 do not divide"),
        ("awq", random_packed((1, 64, 8), "uint4", 32), "cannot be written as 'awq'; nearest: "),
    ],
)
def test_what_a_layout_has_no_place_for_is_said(layout, leaf, message):
    one = jax.tree.map(lambda array: from_array(array[0]), leaf)
    with pytest.raises(ValueError, match=message):
        quantized.written(layout, {"model.layers.0.mlp.up_proj": one}, [])


def test_a_model_of_two_formats_is_ours_alone():
    matrices = {name: jax.tree.map(lambda array: from_array(array[0]), random_packed((1, 64, 8), name, 64)) for name in ("nf4", "fp4")}
    assert quantized.written("auto", matrices, [])[0]["matrices"] == {"nf4": ["nf4", "bfloat16"], "fp4": ["fp4", "bfloat16"]}
    with pytest.raises(ValueError, match="the model: bitsandbytes has one format in a model, not fp4 and nf4"):
        quantized.written("bitsandbytes", matrices, [])


def test_a_model_without_packed_matrices_and_one_with_an_adapter_are_refused(tmp_path, model, key):
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.init, key))
    with pytest.raises(ValueError, match="no quantised matrices"):
        export.export_model(tmp_path / "out", model, params, None, layout="auto")
    method = peft.lora(["up_proj"], rank=1)
    adapted = method.attach(*method.init(key, random_params(model, "nf4", 64)))
    with pytest.raises(ValueError, match="'layers/mlp/up_proj/kernel' is a LoraWeight: merge the adapter before"):
        export.export_model(tmp_path / "out", model, adapted, None, layout="auto")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory, model):
    return export.export_model(
        tmp_path_factory.mktemp("written") / "out", model, random_params(model, "nf4", 64, nested=True), None, layout="auto"
    )


def copy(written, target, weights):
    target.mkdir()
    for file in written.iterdir():
        (target / file.name).write_bytes(weights if file.suffix == ".safetensors" else file.read_bytes())
    return target


def read_all(path):
    for tensor in folder.read(path).tensors.values():
        jax.tree.map(lambda part: part.read(), tensor.packed) if tensor.packed else tensor.read()


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_seen(tmp_path, written, seed):
    data = bytearray((written / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    place = int(np.random.default_rng(seed).integers(start, len(data)))
    data[place] ^= 1 << seed % 8
    read_all(written)
    with pytest.raises(ValueError, match="is not what was written"):
        read_all(copy(written, tmp_path / "flipped", data))


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_seen_on_a_mesh_that_reads_parts(tmp_path, written, model, seed):
    data = bytearray((written / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    codes = header[f"model.layers.{seed % 2}.mlp.up_proj.weight"]["data_offsets"]
    data[start + int(np.random.default_rng(seed).integers(*codes))] ^= 1 << seed
    place = sharding.placement(sharding.make_mesh(data=1, fsdp=2, tensor=4))
    with pytest.raises(ValueError, match="is not what was written"):
        load.load_params(folder.read(copy(written, tmp_path / "flipped", data)), model, place=place)


def test_a_tensor_is_checked_when_a_part_of_it_is_read_and_once():
    array, reads, sums = np.arange(12.0).reshape(3, 4), [], {}
    list(checksums.recorded(["a"], [array], sums))

    def fetch(index):
        reads.append(array[index].shape)
        return array[index]

    lazy = LazyTensor(array.shape, array.dtype, fetch)
    found = checksums.verified({"a": lazy}, checksums.content(sums), "test")["a"]
    for _ in range(2):
        np.testing.assert_array_equal(found.read((slice(1, 2),)), array[1:2])
    found.read()
    assert reads == [(3, 4), (1, 4), (3, 4)]


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_file_is_said(tmp_path, written, left):
    data = (written / "model.safetensors").read_bytes()
    cut = int(left * len(data)) if isinstance(left, float) else left
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        folder.read(copy(written, tmp_path / "cut", data[:cut]))


def test_weights_without_their_checksum_are_refused(tmp_path, written):
    target = copy(written, tmp_path / "other", (written / "model.safetensors").read_bytes())
    sums = json.loads((target / checksums.FILE).read_text())
    del sums["crc32"]["model.norm.weight"]
    (target / checksums.FILE).write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="has no crc32 of 'model.norm.weight'"):
        folder.read(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrices": {}}, r"weight.codes needs \[format, dtype\]"),
        ({"version": 2}, "version=2 is not implemented, only 1 is"),
    ],
)
def test_our_own_files_are_read_as_strictly(change, message):
    weight = jax.tree.map(lambda array: from_array(array[0]), random_packed((1, 64, 8), "uint4", 32, permuted=True))
    settings, parts = quantized.written("ftjax", {"up": weight}, [])
    tensors = {f"up.{part}": tensor for part, tensor in parts["up"].items()}
    with pytest.raises(ValueError, match=message):
        quantized.gathered("test", {"quantization_config": settings | change}, tensors)
    for part, value, said in (
        ("weight.order", np.zeros(64, np.int32), "up.weight.order is no order of 64 rows"),
        ("weight.scales", np.zeros((3, 8), np.float32), "up.weight.scales are of 3 groups, which do not divide 64 rows"),
        ("weight.zeros", np.zeros((2, 7), np.float32), r"up.weight.zeros is \[2, 7\], expected \[2, 8\]"),
    ):
        with pytest.raises(ValueError, match=said):
            quantized.gathered("test", {"quantization_config": settings}, tensors | {f"up.{part}": from_array(value)})
