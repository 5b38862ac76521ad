"""Biases beside an adapter in PEFT's folders: PEFT's numbers from its files, ours back bitwise, other sets refused."""

import json

import jax
import pytest
import safetensors.numpy

from ftjax import peft, tree
from ftjax.hf import peft as hf_peft
from tests.hf.conftest import GOLDENS, check_numbers, check_round_trip, check_written, contents

NAMES = ["lora_bias_all", "lora_bias_saved", "lora_bias_only", "dora_bias_only", "oft_bias_only"]  # third_party/peft/bias_golden.py
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", NAMES)
def test_logits_gradients_and_merged_weights_are_those_of_peft(biased, name):
    check_numbers(*biased, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_fields_and_tensors_are_those_that_peft_writes(tmp_path, biased, name):
    check_written(tmp_path / "a", *biased, name, "base_qwen2")


def test_only_the_biases_of_the_file_are_trained_on(biased):
    adapter = hf_peft.load_adapter(GOLDENS / "lora_bias_only", biased[0])
    assert {path: leaf.shape for path, leaf in tree.flatten(adapter.trainable["bitfit"]).items()} == {
        "layers/self_attn/q_proj/bias": (1, 16),
        "layers/self_attn/v_proj/bias": (1, 8),
    }


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (peft.chain(peft.lora(rank=2), peft.bitfit()), "all"),
        (peft.chain(peft.lora(["up_proj"], rank=2), peft.full(".*bias")), "all"),
        (peft.chain(peft.lora(["q_proj", "down_proj"], rank=2), peft.bitfit(".*q_proj/bias")), "lora_only"),
        (peft.chain(peft.vera(["q_proj"], rank=2, layers=[1]), peft.bitfit(".*q_proj/bias", layers=[1])), "vera_only"),
        (peft.chain(peft.adalora(["v_proj"], steps=9, init_rank=4, target_rank=2), peft.bitfit(".*v_proj/bias")), "lora_only"),
        (peft.chain(peft.lora(["q_proj"], rank=2), peft.bitfit(), peft.value_head(bias=False)), "all"),
    ],
    ids=["lora", "full", "only", "layers", "adalora", "head"],
)
def test_a_round_trip_is_bitwise_and_computes_the_same(tmp_path, biased, method, word):
    assert check_round_trip(tmp_path, *biased, method)[0]["bias"] == word


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            peft.chain(peft.lora(["up_proj"], rank=2), peft.bitfit(".*q_proj/bias")),
            r"train 'layers/self_attn/q_proj/kernel' too, or all biases of the model, as bitfit\(\) does, or exactly those of the matrices",
        ),
        (peft.chain(peft.lora(["q_proj"], rank=2), peft.bitfit(".*q_proj/bias", layers=[1])), "or all biases of the model"),
        (peft.chain(peft.ia3(["k_proj"], feedforward=None), peft.bitfit()), "PEFT has no biases beside IA3"),
    ],
)
def test_a_set_of_biases_that_peft_has_no_word_for_is_not_written(tmp_path, biased, method, message):
    model, params = biased
    trainable = method.init(jax.random.key(0), params)[1]
    with pytest.raises(ValueError, match=message):
        hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))
    assert not (tmp_path / "a").exists()


def changed(target, name, config, tensors):
    written, found = contents(GOLDENS / name)
    tensors(found)
    (target / hf_peft.CONFIG).write_text(json.dumps(written | config))
    safetensors.numpy.save_file(found, target / hf_peft.WEIGHTS)
    return target


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, lambda found: found.pop(f"{Q0}.base_layer.bias"), r"missing: base_model.model.model.layers.0.self_attn.q_proj.bias \[16\]"),
        ({}, lambda found: found.update({f"{Q0}.base_layer.bias": found[f"{Q0}.base_layer.bias"][:8]}), r"q_proj.base_layer.bias is \[8\]"),
        ({"bias": "lora_only"}, lambda found: None, r"extra: base_model.model.model.layers.0.self_attn.k_proj.bias \[8\]"),
        ({"bias": "none"}, lambda found: None, "extra: .*layers.0.self_attn.k_proj.bias"),
        ({"bias": "some"}, lambda found: None, "not yet: bias='some'"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, biased, config, tensors, message):
    with pytest.raises(ValueError, match=message):
        hf_peft.load_adapter(changed(tmp_path, "lora_bias_all", config, tensors), biased[0])


def test_biases_of_older_files_have_no_base_layer_in_their_names(tmp_path, biased):
    def rename(found):
        for name in list(found):
            found[name.replace(".base_layer.bias", ".bias")] = found.pop(name)

    got, want = (
        hf_peft.load_adapter(folder, biased[0]).trainable
        for folder in (changed(tmp_path, "lora_bias_all", {}, rename), GOLDENS / "lora_bias_all")
    )
    assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True))
