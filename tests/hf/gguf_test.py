"""GGUF checkpoints: the logits that transformers computes from the same files, for every family and every block type."""

from pathlib import Path

import gguf as gguf_package
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models
from ftjax.hf import gguf, load
from ftjax.hf.gguf_file import File, Packed

GOLDENS = Path(__file__).parents[1] / "goldens" / "gguf"
TOKENS = np.arange(12, dtype=np.int32)[None] * 7 % 300  # third_party/transformers/tokenizer_golden.py
KINDS = [kind for kind in gguf_package.GGMLQuantizationType if kind in gguf_package.quants._type_traits]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_logits_are_those_of_transformers(family):
    checkpoint = gguf.read(GOLDENS / f"{family}.gguf")
    model = models.build(models.config_from_hf(checkpoint.config))
    params = load.load_params(checkpoint, model)
    hidden, _ = model.apply(params, jnp.asarray(TOKENS))
    logits, golden = np.asarray(model.unembed(model.head(params), hidden))[0, ::3], np.load(GOLDENS / f"{family}.npy")
    assert np.abs(logits - golden).max() <= 1e-5 * np.abs(golden).max()


def packed(array, kind=gguf_package.GGMLQuantizationType.F32):
    rows = gguf_package.quants.quantize(array, kind) if kind is not None else array
    return Packed(array.shape, kind, rows.view(np.uint8).reshape(*array.shape[:-1], -1))


def llama(**tensors):
    metadata = {
        "general.architecture": "llama",
        "llama.attention.head_count": 2,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 8,
        "llama.block_count": 1,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 500000.0,
        "llama.context_length": 32,
    }
    embed = packed(np.ones((4, 256), np.float32))
    return File(metadata, {"token_embd.weight": embed, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_block_type_is_dequantised_row_by_row(kind):
    block, size = gguf_package.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 100, (4, 256 // block * size), np.uint8)
    expected = gguf_package.quants.dequantize(rows, kind)
    tensor = gguf.read(Path("x"), llama(output_norm__weight=Packed((4, 256), kind, rows))).tensors["model.norm.weight"]
    np.testing.assert_array_equal(tensor.read(), expected)
    np.testing.assert_array_equal(tensor.read((slice(1, 3), slice(5, 9))), expected[1:3, 5:9])


def test_rows_of_q_and_k_move_from_neighbours_to_halves():
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 32), np.float32)  # two heads of four channels
    tensor = gguf.read(Path("x"), llama(blk__0__attn_q__weight=packed(rows))).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert tensor.read()[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert tensor.read((slice(1, 3),))[:, 0].tolist() == [2, 1]


def test_float32_metadata_become_the_decimals_they_stand_for():
    config = gguf.read(Path("x"), llama()).config
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 500000.0 and config["tie_word_embeddings"]


def test_llama_3_scaling_is_recognised_by_its_divisors():
    rope = models.config_from_hf(models.PRESETS["llama-3.1-8b"]).rope
    frequencies = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    scaled = models.rope.frequencies(rope, 128)
    file = llama(rope_freqs__weight=packed((frequencies / scaled).astype(np.float32)))
    scaling = gguf.read(Path("x"), file).config["rope_scaling"]
    assert scaling == models.PRESETS["llama-3.1-8b"]["rope_scaling"]
    file = llama(rope_freqs__weight=packed(np.linspace(1, 8, 64, dtype=np.float32)))
    with pytest.raises(ValueError, match="frequency factors that are not Llama 3's"):
        gguf.read(Path("x"), file)


def test_an_unknown_architecture_or_lacking_key_is_named():
    file = llama()
    with pytest.raises(ValueError, match="'gemma' is not supported; nearest: 'gemma[23]'"):
        gguf.read(Path("x"), file._replace(metadata=file.metadata | {"general.architecture": "gemma"}))
    del file.metadata["llama.block_count"]
    with pytest.raises(ValueError, match="x: the metadata lack 'llama.block_count'"):
        gguf.read(Path("x"), file)


def test_an_unknown_tensor_keeps_its_name_for_the_loader_to_list():
    assert "blk.0.ssm_a" in gguf.read(Path("x"), llama(blk__0__ssm_a=packed(np.ones((2, 32), np.float32)))).tensors
