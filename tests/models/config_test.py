"""`config.json` in both spellings, out again, and every way in which it is refused."""

import dataclasses

import numpy as np
import pytest
import transformers

from ftjax import models
from ftjax.models import rope
from ftjax.models.config import Rope

LLAMA = models.PRESETS["llama-3.1-8b"]
GEMMA = models.PRESETS["gemma-3-4b"]


@pytest.mark.parametrize("name", models.PRESETS)
def test_export_and_import_give_the_config_back(name):
    config = models.preset(name)
    assert models.config_from_hf(models.to_hf(config)) == config


@pytest.mark.parametrize("name", [name for name in models.PRESETS if name.startswith("tiny-")])
def test_transformers_reads_our_export_as_we_do(name):
    config = models.preset(name)
    raw = models.to_hf(config)
    theirs = transformers.AutoConfig.for_model(**raw).to_dict()
    assert dataclasses.replace(models.config_from_hf(theirs), dtype=config.dtype) == config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.2, "truncate": False}


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m"])
def test_yarn_goes_out_as_transformers_reads_it(name):
    config = models.config_from_hf({**models.PRESETS[name], "rope_scaling": YARN})
    raw = models.to_hf(config)
    assert raw["rope_scaling"] == YARN
    theirs = transformers.AutoConfig.for_model(**raw).to_dict()
    assert dataclasses.replace(models.config_from_hf(theirs), dtype=config.dtype) == config


@pytest.mark.parametrize("raw", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_the_spelling_of_transformers_5_means_the_same(raw):
    raw = dict(raw)
    config = models.config_from_hf(raw)
    main = {"rope_theta": raw.pop("rope_theta", 1e6), **raw.pop("rope_scaling")}
    nested = {"full_attention": main, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    raw |= {"rope_parameters": main if raw["model_type"] == "llama" else nested, "dtype": raw.pop("torch_dtype")}
    assert models.config_from_hf(raw) == config


def test_a_multimodal_wrapper_stands_for_its_text_model():
    text = {name: value for name, value in GEMMA.items() if name not in ("torch_dtype", "eos_token_id")}
    wrapper = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106], "torch_dtype": "bfloat16"}
    assert models.config_from_hf(wrapper) == models.preset("gemma-3-4b")


def test_gemma_alternates_and_says_which_rope_and_window():
    config = models.preset("gemma-3-4b")
    assert config.windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)
    assert (config.rope.rope_theta, config.rope.factor, config.local_rope) == (1e6, 8.0, Rope(rope_theta=1e4))
    assert models.preset("gemma-2-2b").windows[:3] == (4096, None, 4096)
    assert set(models.preset("mistral-7b").windows) == {4096} and set(models.preset("mistral-7b-v0.3").windows) == {None}


def test_llama3_frequencies_keep_the_short_stretch_the_long_and_blend_between():
    """By hand, original context 8192 and factor 8: a wavelength below 8192/4 is kept, one above 8192/1 is divided by 8."""
    config = models.preset("llama-3.1-8b")
    plain = rope.frequencies(Rope(rope_theta=500000.0), 128)
    ratio = rope.frequencies(config.rope, 128) / plain
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 2048], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-6)
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) and np.all((between > 1 / 8) & (between < 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen4"}, "model_type 'qwen4' is not implemented; nearest: 'qwen3'"),
        ({"sliding_windw": 5, "rms_norm_esp": 1e-5}, "'sliding_windw' is not a known option.*'rms_norm_esp' .* nearest: 'rms_norm_eps'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not implemented"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not implemented"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; one of silu"),
        ({"torch_dtype": "float8"}, "dtype 'float8' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic' is not supported: its frequencies change"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "'longrope' is not supported: .* two tables"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope option 'factor' must be a number, not '4'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}}, "yarn needs beta_fast >= beta_slow"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}}, "rope_type 'linear' has no option 'mscale'"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is no multiple of num_key_value_heads 5"),
        ({"num_attention_heads": "32", "vocab_size": 0}, "vocab_size must be a positive integer, not 0.*num_attention_heads .* not '32'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        models.config_from_hf({**LLAMA, **change})


def test_contradictions_between_layers_are_refused():
    tiny = models.PRESETS["tiny-qwen2"]
    with pytest.raises(ValueError, match="layer_types names 1 layers of 2"):
        models.config_from_hf({**tiny, "layer_types": ["full_attention"]})
    with pytest.raises(ValueError, match="layer_types 'chunked_attention' is not supported"):
        models.config_from_hf({**tiny, "layer_types": ["full_attention", "chunked_attention"]})
    with pytest.raises(ValueError, match="sliding_window is not set"):
        models.config_from_hf({**tiny, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": None})
