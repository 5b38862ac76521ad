"""Hugging Face folders: what is read is what was written, and what is damaged is named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ftjax.hf import folder

RNG = np.random.default_rng(0)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def write(path, tensors, shards=1):
    (path / "config.json").write_text('{"model_type": "llama"}')
    names = sorted(tensors)
    files = [f"model-{i}-of-{shards}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        safetensors.numpy.save_file({n: tensors[n] for n in names[i::shards]}, path / file)
    if shards > 1:
        where = {n: files[i % shards] for i, n in enumerate(names)}
        (path / folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_is_read_bitwise_from_one_file_or_many(tmp_path, dtype, shards):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": RNG.standard_normal((5, 3)).astype(dtype) for i in range(4)}
    checkpoint = folder.read(write(tmp_path, tensors, shards))
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        lazy = checkpoint.tensors[name]
        assert lazy.shape == array.shape and lazy.dtype == array.dtype
        assert lazy.read().tobytes() == array.tobytes()
        np.testing.assert_array_equal(lazy.read((slice(1, 4), slice(2, 3))), array[1:4, 2:3])


def damaged(data):
    header = int.from_bytes(data[:8], "little")
    return {
        "empty": b"",
        "half a header size": data[:5],
        "half a header": data[: header // 2],
        "half the data": data[: header + 20],
        "an impossible header size": b"\xff" * 8 + data[8:],
        "no JSON": data[:8] + b"x" * header + data[8 + header :],
        "extra data": data + b"0000",
    }


@pytest.mark.parametrize("damage", damaged(b"\0" * 64))
def test_a_damaged_file_is_named(tmp_path, damage):
    write(tmp_path, {"model.norm.weight": np.ones((16,), np.float32)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(damaged(file.read_bytes())[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        folder.read(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    write(tmp_path, {"model.norm.weight": np.ones((16,), np.uint16)})
    with pytest.raises(ValueError, match="'model.norm.weight' has dtype U16"):
        folder.read(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no 'weight_map'"),
        ({"a": 3}, "has no 'weight_map'"),
        ({"a": "../secret.safetensors"}, r"not in the folder: \['../secret.safetensors'\]"),
        ({"a": "gone.safetensors"}, r"not in the folder: \['gone.safetensors'\]"),
        ({"absent": "model.safetensors"}, r"do not hold: \['absent'\]"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, message):
    write(tmp_path, {"model.norm.weight": np.ones((16,), np.float32)})
    (tmp_path / folder.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        folder.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    write(tmp_path, {"model.norm.weight": np.ones((16,), np.float32)})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        folder.read(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        folder.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file in .*pytorch_model\.bin are pickles"):
        folder.read(tmp_path)


def test_two_files_without_an_index_are_refused(tmp_path):
    write(tmp_path, {"a": np.ones(3, np.float32)})
    safetensors.numpy.save_file({"b": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="and no model.safetensors.index.json"):
        folder.read(tmp_path)
