"""From files to parameters: one error lists all that is wrong, leaves are read once, and a host reads its own shards."""

import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftjax import models, sharding, tree
from ftjax.hf import export, load, names, tokenizer
from ftjax.hf.folder import Checkpoint
from ftjax.hf.lazy import LazyTensor, from_array
from ftjax.types import Model

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def checkpoint_of(model, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    tensors = {
        name: from_array(rng.standard_normal(names.leaf_shape(path, leaf.shape)).astype(dtype))
        for path, leaf in shapes.items()
        for name in names.tensors(path, leaf.shape)
    }
    return Checkpoint("test", models.to_hf(model.config), tensors)


@pytest.fixture(scope="module")
def model():
    return models.build(models.preset("tiny-llama"))


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_leaves_are_stacked_transposed_and_cast(model, dtype):
    checkpoint = checkpoint_of(model, np.float16)
    params = tree.flatten(load.load_params(checkpoint, model, dtype=dtype))
    for name, tensor in checkpoint.tensors.items():
        path, layer = names.path(name)
        leaf = params[path] if layer is None else params[path][layer]
        expected = tensor.read().T if names.is_transposed(path) else tensor.read()
        assert leaf.dtype == (dtype or jnp.float16)
        np.testing.assert_array_equal(np.asarray(leaf), expected.astype(dtype or np.float16))


def test_all_that_is_wrong_is_in_one_error(model):
    checkpoint = checkpoint_of(model)
    tensors = checkpoint.tensors
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = from_array(np.ones((64, 32), np.float32))
    tensors["model.layers.0.self_attn.q_proj.weight"] = from_array(np.ones((32, 31), np.float32))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = from_array(np.ones(4, np.float32))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # repeats the tied embedding
    with pytest.raises(ValueError, match=r"4 problems") as error:
        load.load_params(checkpoint, model)
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.1.mlp.up_proj.weight [64, 32]",
        "  missing: model.norm.weight [32]",
        "  extra: model.layers.2.mlp.up_proj.weight [64, 32]",
        "  misshapen: model.layers.0.self_attn.q_proj.weight is [32, 31], expected [32, 32]",
    ]


def test_an_untied_head_is_missed():
    model = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | {"tie_word_embeddings": False}))
    checkpoint = checkpoint_of(model)
    del checkpoint.tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[260, 32\]"):
        load.load_params(checkpoint, model)


def test_on_a_mesh_only_shards_are_read_and_the_values_are_the_same(model):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    largest = 0

    def watched(tensor):
        def fetch(index):
            nonlocal largest
            block = tensor.read(index)
            largest = max(largest, block.size) if block.ndim == 2 else largest
            return block

        return LazyTensor(tensor.shape, tensor.dtype, fetch)

    def place(path, tensor):
        if not names.is_stacked(path) or len(tensor.shape) < 3:
            return load.on_default_device(path, tensor)
        return jax.make_array_from_callback(tensor.shape, split, tensor.read)

    checkpoint = checkpoint_of(model)
    watching = checkpoint._replace(tensors={n: watched(t) if n.startswith("model.layers") else t for n, t in checkpoint.tensors.items()})
    sharded, plain = load.load_params(watching, model, place=place), load.load_params(checkpoint, model)
    assert largest == 64 * 32 // 8
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)


def test_the_rules_of_a_mesh_place_a_checkpoint(model):
    mesh = jax.make_mesh((1, 4, 2, 1), ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    checkpoint = checkpoint_of(model)
    params = load.load_params(checkpoint, model, place=sharding.placement(mesh))
    jax.tree.map(np.testing.assert_array_equal, params, load.load_params(checkpoint, model))
    assert len({str(shard.index) for shard in params["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards}) == 8


def test_the_host_never_holds_a_second_copy():
    shapes = {"embed_tokens/kernel": (64, 64), "layers/mlp/up_proj/kernel": (16, 64, 512), "layers/mlp/down_proj/kernel": (16, 512, 64)}
    model = Model(None, lambda key: tree.unflatten({p: jnp.zeros(s) for p, s in shapes.items()}), None, None, None)

    def random(shape):
        return LazyTensor(shape, np.dtype(np.float32), lambda index: np.random.default_rng(0).random(shape, np.float32)[index])

    tensors = {n: random(names.leaf_shape(p, s)) for p, s in shapes.items() for n in names.tensors(p, s)}
    tracemalloc.start()
    try:
        params = load.load_params(Checkpoint("test", {}, tensors), model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree.num_bytes(params) < peak < 1.2 * tree.num_bytes(params)  # each layer is read once, into its place


def test_a_name_gives_model_params_and_tokenizer(tmp_path, model, key):
    params = model.init(key)
    export.export_model(tmp_path / "out", model, params, tokenizer.byte_tokenizer())
    found = load.load(str(tmp_path / "out"))
    assert found.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert found.tokenizer.encode("hi") == [104, 105]
    assert load.load(str(tmp_path / "out"), dtype="bfloat16").params["norm"]["scale"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_smollm2_computes_the_logits_that_transformers_computes():
    model, params, tokens, _ = load.load("smollm2-135m-instruct", dtype="float32")
    with np.load(GOLDENS / "smollm2_logits.npz") as golden:
        for n in range(2):
            ids = jnp.asarray(golden[f"tokens_{n}"])[None]
            hidden, _ = jax.jit(model.apply)(params, ids)
            logits = np.asarray(model.unembed(model.head(params), hidden))[0]
            scale = np.abs(golden[f"last_{n}"]).max()
            assert np.abs(logits[-1, ::8] - golden[f"last_{n}"]).max() <= 1e-4 * scale
            top = np.take_along_axis(logits, golden[f"top_ids_{n}"], axis=1)
            assert np.abs(top - golden[f"top_logits_{n}"]).max() <= 1e-4 * scale
            assert tokens.encode(tokens.decode(golden[f"tokens_{n}"])) == golden[f"tokens_{n}"].tolist()
