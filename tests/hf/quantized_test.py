"""Folders that others quantised are read as they are: their matrices bit for bit, no dense copy, and what is damaged is said."""

import hashlib
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file

from ftjax import models, quant, sharding, tree, weights
from ftjax.hf import folder, load, quantized, quantized_gptq, quantized_parts
from ftjax.hf.lazy import LazyTensor, from_array
from ftjax.hf.quantized_parts import Parts
from ftjax.quant import QuantizedWeight
from ftjax.quant.permuted import PermutedWeight

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "quantized"  # third_party/{bitsandbytes/folder_golden,gptq/golden,awq/golden}.py
KINDS = ("nf4", "fp4", "int8", "gptq", "gptq_sorted", "gptq_8bit", "gptq_8bit_sorted", "awq")
FORMATS = {"gptq": "int4", "gptq_sorted": "uint4", "gptq_8bit": "uint8", "gptq_8bit_sorted": "uint8", "awq": "uint4"}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def expected(kind):
    return json.loads((GOLDENS / kind / "expected.json").read_text())


def contents(kind):
    """The config and the tensors of a folder, in memory."""
    return json.loads((GOLDENS / kind / "config.json").read_text()), load_file(GOLDENS / kind / "model.safetensors")


def opened(config, tensors):
    """What `folder.read` makes of them, and every number of it read."""
    config, found = quantized.gathered("test", config, {name: from_array(tensor) for name, tensor in tensors.items()})
    for tensor in found.values():
        jax.tree.map(lambda part: part.read(), tensor.packed) if tensor.packed else tensor.read()
    return config, found


@pytest.fixture(scope="module")
def loaded():
    """`{kind: (model, parameters)}` in float32."""
    found = {}
    for kind in KINDS:
        checkpoint = folder.read(GOLDENS / kind)
        model = models.build(load.config_of(checkpoint))
        found[kind] = model, load.load_params(checkpoint, model, dtype="float32")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_theirs_bit_for_bit(kind):
    tensors = folder.read(GOLDENS / kind).tensors
    matrices = {module: tensors[f"{module}.weight"].read() for module in expected(kind)["sha256"]}
    sums = {module: hashlib.sha256((matrix + matrix.dtype.type(0)).tobytes()).hexdigest() for module, matrix in matrices.items()}
    assert sums == expected(kind)["sha256"] and len(sums) == 14


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_stay_packed_and_the_rest_is_dense(loaded, kind):
    leaves = tree.flatten(loaded[kind][1])
    for path, leaf in leaves.items():
        if path.endswith("_proj/kernel"):
            base = leaf.base if kind.endswith("sorted") else leaf
            assert isinstance(leaf, PermutedWeight if kind.endswith("sorted") else QuantizedWeight)
            assert base.format == FORMATS.get(kind, kind) and base.codes.shape[0] == 2 and base.codes.dtype.itemsize == 1
        else:
            assert not isinstance(leaf, weights.Weight) and leaf.dtype == jnp.float32
    assert ("layers/self_attn/q_proj/bias" in leaves) == (kind in ("nf4", "fp4", "int8"))


@pytest.mark.parametrize("kind", ["nf4", "gptq_sorted"])
def test_logits_are_those_of_transformers(loaded, kind):
    """With bitsandbytes' modules, and with the matrices that AutoGPTQ's stand for."""
    model, params = loaded[kind]
    hidden, _ = model.apply(params, jnp.asarray(expected(kind)["tokens"])[None])
    found = model.unembed(model.head(params), hidden)[0, -1]
    np.testing.assert_allclose(found, expected(kind)["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_a_part_of_the_whole(kind):
    """So a host of a mesh reads its own shards."""
    weight = folder.read(GOLDENS / kind).tensors[f"{DOWN}.weight"].packed
    for part in jax.tree.leaves(weight):
        for cut in (slice(0, 1), slice(3, 6), slice(1, None)):
            index = tuple(cut if size > 3 else slice(0, size) for size in part.shape)
            np.testing.assert_array_equal(part.read(index), part.read()[index], strict=True)


@pytest.mark.parametrize("kind", ["nf4", "gptq_sorted"])
def test_the_rules_of_a_mesh_place_packed_matrices(loaded, kind):
    mesh = jax.make_mesh((1, 2, 4, 1), ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    model, expected = loaded[kind]
    params = load.load_params(folder.read(GOLDENS / kind), model, dtype="float32", place=sharding.placement(mesh))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    weight = params["layers"]["self_attn"]["q_proj"]["kernel"]
    codes = (weight.base if kind == "gptq_sorted" else weight).codes
    assert len({str(shard.index) for shard in codes.addressable_shards}) > 1


def test_the_host_holds_packed_bytes_and_a_layer():
    layers, i, o = 8, 256, 1024
    weights_ = [
        quantized_gptq.read(
            Parts("up", {name: zeros(*what) for name, what in parts.items()}, {"group_size": 64, "sym": False}, np.dtype("f2"))
        )
        for parts in [{"qweight": ((i // 8, o), "i4"), "qzeros": ((4, o // 8), "i4"), "scales": ((4, o), "f2")}] * layers
    ]
    tensors = [LazyTensor((o, i), np.dtype("f2"), lambda index: pytest.fail("a dense matrix"), weight) for weight in weights_]
    tracemalloc.start()
    try:
        leaf = load.on_default_device("", load.leaf("layers/mlp/up_proj/kernel", tensors))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree.num_bytes(leaf) <= peak < tree.num_bytes(leaf) + 4 * i * o


def zeros(shape, dtype):
    return LazyTensor(shape, np.dtype(dtype), lambda index: np.zeros(shape, dtype)[index])


def test_the_dtype_of_a_folder_is_that_of_what_it_stands_for():
    assert [load.stored_dtype(folder.read(GOLDENS / kind)).name for kind in ("nf4", "fp4", "gptq")] == ["float32", "float16", "float16"]


def test_the_two_formats_of_gptq_differ_in_their_zeros_alone():
    config, tensors = contents("gptq_sorted")
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = tensors[name] + np.int32(0x11111111)  # none of them is 15
    found = opened(config, tensors)[1]
    for name, tensor in folder.read(GOLDENS / "gptq_sorted").tensors.items():
        np.testing.assert_array_equal(found[name].read(), tensor.read())


@pytest.mark.parametrize(
    ("kind", "file", "renamed"),
    [("gptq", "quantize_config.json", {}), ("awq", "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"})],
)
def test_settings_of_old_releases_lie_beside_the_config(tmp_path, kind, file, renamed):
    config, _ = contents(kind)
    settings = {renamed.get(name, name): value for name, value in config.pop("quantization_config").items() if name != "quant_method"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes((GOLDENS / kind / "model.safetensors").read_bytes())
    assert folder.read(tmp_path).tensors[f"{Q}.weight"].packed.format == FORMATS[kind]


def test_a_bias_is_left_out_only_where_it_is_zero():
    config, tensors = contents("gptq")
    assert f"{Q}.bias" in tensors
    tensors[f"{Q}.bias"][3] = 1
    found = folder.Checkpoint("test", *opened(config, tensors))
    with pytest.raises(ValueError, match=r"1 problems\):\n  extra: model.layers.0.self_attn.q_proj.bias"):
        load.load_params(found, models.build(load.config_of(found)))


def test_layers_of_one_leaf_are_packed_alike():
    config, tensors = contents("int8")
    del tensors[f"{Q}.SCB"], tensors[f"{Q}.weight_format"]
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].astype(np.float32)
    found = folder.Checkpoint("test", *opened(config, tensors))
    with pytest.raises(ValueError, match="'layers/self_attn/q_proj/kernel' is dense in layer 0 and int8 by 64 rows of float32 in layer 1"):
        load.load_params(found, models.build(load.config_of(found)))


def test_a_quantiser_leaves_what_is_in_its_format_and_refuses_another():
    checkpoint = folder.read(GOLDENS / "nf4")
    model = models.build(load.config_of(checkpoint))
    same = load.load_params(checkpoint, model, quantizer=quant.nf4())
    assert same["layers"]["mlp"]["up_proj"]["kernel"].format == "nf4"
    with pytest.raises(ValueError, match="'layers/mlp/down_proj/kernel' is packed already, nf4 by 64 rows"):
        load.load_params(checkpoint, model, quantizer=quant.int4(), place=lambda path, tensor: pytest.fail("read"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantiser_chooses_what_multiplies_the_packed_matrices_of_a_folder(loaded, kind):
    model, expected = loaded[kind]
    base = quantized_parts.plain(expected["layers"]["mlp"]["up_proj"]["kernel"])
    method = quant.METHODS[base.format](group=base.group, nested=base.nested, implementation="reference")
    params = load.load_params(folder.read(GOLDENS / kind), model, dtype="float32", quantizer=method)
    found, _ = method.init(jax.random.key(0), params)
    assert quantized_parts.plain(found["layers"]["mlp"]["up_proj"]["kernel"]).implementation == "reference" != base.implementation
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_embedding_is_not_packed():
    config, tensors = contents("int8")
    tensors["model.embed_tokens.weight"] = tensors.pop(f"{Q}.weight")
    tensors["model.embed_tokens.SCB"] = tensors[f"{Q}.SCB"]
    packed = opened(config, {name: tensor for name, tensor in tensors.items() if Q not in name})[1]["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="'embed_tokens/kernel' is quantised in the file"):
        load.leaf("embed_tokens/kernel", [packed])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nf4", {"quant_method": "bitsandbite"}, "quant_method 'bitsandbite' is not implemented; nearest: 'bitsandbytes'"),
        ("nf4", {"quant_method": "bitsandbytes", "bnb_4bit_blocksize": 64}, "'bnb_4bit_blocksize' is not a known option; nearest: "),
        ("int8", {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True is not implemented, only False"),
        ("gptq", {"bits": 3, "dynamic": {"+:q": {}}}, r"bits=3 is not implemented, only 4 or 8 is; dynamic=\{'\+:q': \{\}\} is not"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not"),
        ("awq", {"version": "gemv"}, "version='gemv' is not implemented, only 'gemm'"),
        ("awq", {"zero_point": False}, "zero_point=False is not"),
    ],
)
def test_an_option_that_is_not_implemented_is_named(kind, change, message):
    config, tensors = contents(kind)
    config["quantization_config"] |= change
    with pytest.raises(ValueError, match=message):
        opened(config, tensors)


def said(changes):
    """A change of what `quant_state` says."""
    name = f"{Q}.weight.quant_state.bitsandbytes__nf4"

    def change(tensors):
        state = json.loads(tensors[name].tobytes()) | changes
        tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def replaced(part, function, module=Q):
    def change(tensors):
        tensors[f"{module}.{part}"] = function(tensors[f"{module}.{part}"].copy())

    return change


def removed(part, module=Q):
    return lambda tensors: tensors.pop(f"{module}.{part}")


def put(array, value):
    array.reshape(-1)[5] = value
    return array


STATE = "weight.quant_state.bitsandbytes__nf4"
DAMAGE = [
    ("nf4", said({"shape": [128, 32]}), "q_proj.weight has rows of 32 numbers, which blocks of 64 do not divide"),
    ("nf4", said({"shape": [64]}), "shape is [64], expected two sizes"),
    ("nf4", said({"shape": [64, 128]}), "q_proj.weight is [2048, 1] uint8, expected 4096 bytes"),
    ("nf4", said({"blocksize": 63}), "blocksize is 63"),
    ("nf4", said({"blocksize": "64"}), "blocksize is '64', expected int"),
    ("nf4", said({"dtype": "int8"}), "dtype is 'int8', expected one of"),
    ("nf4", said({"quant_type": "fp4"}), "quant_type is 'fp4' in a tensor named nf4"),
    ("nf4", said({"nested_blocksize": 128}), "nested_blocksize is 128"),
    ("nf4", said({"nested_offset": float("nan")}), "nested_offset is nan"),
    ("nf4", said({"colour": 1}), "'colour' is unknown"),
    ("nf4", replaced(STATE, lambda x: x[:-2]), f"{Q}.{STATE} is not the JSON"),
    ("nf4", replaced(STATE, lambda x: x ^ np.uint8(0x80)), f"{Q}.{STATE} is not the JSON"),
    ("nf4", replaced(STATE, lambda x: np.frombuffer(b"[1]", np.uint8)), "[1] is no object"),
    ("nf4", removed(STATE), f"{Q}.{STATE} (or fp4) is expected once"),
    ("nf4", removed("weight.absmax"), f"{Q}.weight.absmax is missing beside"),
    ("nf4", removed("weight.nested_absmax", DOWN), f"{DOWN}.weight.nested_absmax is missing beside"),
    ("nf4", removed("weight"), f"{Q}.weight is missing beside"),
    ("nf4", replaced("weight.absmax", lambda x: x[:-1]), f"{Q}.weight.absmax is [63], expected [64]"),
    ("nf4", replaced("weight.absmax", lambda x: x.astype(np.float32)), f"{Q}.weight.absmax is float32, expected uint8"),
    ("nf4", replaced("weight.nested_absmax", lambda x: x[:1], DOWN), f"{DOWN}.weight.nested_absmax is [1], expected [2]"),
    ("nf4", replaced("weight.nested_absmax", lambda x: -x), f"{Q}.weight.nested_absmax holds numbers that are not finite and at least 0"),
    ("nf4", replaced("weight.quant_map", lambda x: put(x, 0.5)), f"{Q}.weight.quant_map is another code book: number 5 is 0.5"),
    ("nf4", replaced("weight.nested_quant_map", lambda x: put(x, 2)), f"{Q}.weight.nested_quant_map is another code book"),
    ("fp4", replaced("weight.absmax", lambda x: put(x, np.inf)), f"{Q}.weight.absmax holds numbers that are not finite"),
    ("int8", replaced("SCB", lambda x: put(x, np.nan)), f"{Q}.SCB holds numbers that are not finite"),
    ("int8", replaced("SCB", lambda x: x[:32]), f"{Q}.SCB is [32], expected [64]"),
    ("int8", replaced("weight", lambda x: x.view(np.uint8)), f"{Q}.weight is uint8, expected int8"),
    ("int8", replaced("weight_format", lambda x: x + np.uint8(1)), f"{Q}.weight_format is not 0"),
    ("gptq", replaced("scales", lambda x: put(x, np.inf)), f"{Q}.scales holds numbers that are not finite"),
    ("gptq", replaced("scales", lambda x: x[:1]), f"{Q}.scales is [1, 64], expected [2, 64]"),
    ("gptq", replaced("qzeros", lambda x: put(x, 0)), f"{Q}.qzeros are not all 8, as sym=true says"),
    ("gptq_8bit", replaced("qzeros", lambda x: put(x, 0)), f"{Q}.qzeros are not all 128, as sym=true says"),
    ("gptq_8bit", replaced("qzeros", lambda x: x[:, :4]), f"{Q}.qzeros is [2, 4], expected [2, 16]"),
    ("gptq", replaced("qzeros", lambda x: x[:, :4]), f"{Q}.qzeros is [2, 4], expected [2, 8]"),
    ("gptq", replaced("qweight", lambda x: x[:-1]), f"{Q}.qweight has 56 rows, which do not divide into groups of group_size=32"),
    ("gptq", replaced("qweight", lambda x: x.astype(np.int64)), f"{Q}.qweight is int64, expected int32"),
    ("gptq_sorted", replaced("g_idx", lambda x: put(x, 7)), f"{Q}.g_idx does not give each of 2 groups 32 rows"),
    ("awq", removed("qzeros"), f"{Q}.qzeros is missing beside"),
    ("awq", replaced("scales", lambda x: put(x, np.nan)), f"{Q}.scales holds numbers that are not finite"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGE, ids=[f"{kind}-{n}" for n, (kind, _, _) in enumerate(DAMAGE)])
def test_what_is_damaged_is_named(kind, damage, message):
    config, tensors = contents(kind)
    damage(tensors)
    with pytest.raises(ValueError) as error:
        opened(config, tensors)
    assert message in str(error.value)


def test_all_that_is_damaged_is_in_one_error():
    config, tensors = contents("int8")
    for name in [name for name in tensors if name.endswith("SCB")]:
        tensors[name] = tensors[name][1:]
    with pytest.raises(ValueError, match=r"14 problems(.*\n){9}  and 6 more"):
        opened(config, tensors)


def test_bytes_that_pose_as_wider_numbers_are_bytes():
    config, tensors = contents("nf4")
    name = f"{DOWN}.weight"
    disguised = opened(config, tensors | {name: tensors[name].reshape(-1).view(ml_dtypes.bfloat16)[:, None]})[1]
    np.testing.assert_array_equal(disguised[name].read(), opened(config, tensors)[1][name].read())


def test_scales_of_whole_columns_are_read():
    config, tensors = contents("gptq")
    config["quantization_config"]["group_size"] = -1
    parts = {name: x for name, x in tensors.items() if not name.endswith("g_idx")}
    parts |= {name: x[:1] for name, x in tensors.items() if name.endswith(("scales", "qzeros"))}
    weight = opened(config, parts)[1][f"{Q}.weight"].packed
    assert isinstance(weight.codes, LazyTensor) and weight.group == 64
