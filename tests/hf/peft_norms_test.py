"""LN tuning in PEFT's folders: PEFT's numbers from its files, ours back bitwise, and what does not fit is listed."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ftjax import models, peft, tree
from ftjax.hf import peft as hf_peft
from tests.hf.conftest import GOLDENS, check_numbers, check_round_trip, check_written, contents

NAMES = ["ln_tuning", "ln_tuning_some"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_gradients_and_merged_weights_are_those_of_peft(base, name):
    check_numbers(*base, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_fields_and_tensors_are_those_that_peft_writes(tmp_path, base, name):
    check_written(tmp_path / "a", *base, name, "base")


def test_only_the_layers_of_the_file_are_trained_on(base):
    adapter = hf_peft.load_adapter(GOLDENS / "ln_tuning_some", base[0])
    assert {path: leaf.shape for path, leaf in tree.flatten(adapter.trainable).items()} == {
        "norm_tuning/layers/input_layernorm/scale": (2, 24),
        "full/lm_head/kernel": (24, 61),
    }
    assert adapter.kind == "norm_tuning" and adapter.options["layers"] == (0, 2)


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        (peft.norm_tuning(), ["input_layernorm", "norm", "post_attention_layernorm"]),
        (
            peft.norm_tuning("layers/.*norm/scale", layers="last 1", name="mine"),
            ["model.layers.2.input_layernorm", "model.layers.2.post_attention_layernorm"],
        ),
        (
            peft.chain(peft.norm_tuning("layers/input_layernorm/scale", layers=[1]), peft.norm_tuning("norm/scale", name="outer")),
            ["model.layers.1.input_layernorm", "model.norm"],
        ),
    ],
    ids=["all", "last", "two sets"],
)
def test_a_round_trip_is_bitwise_and_computes_the_same(tmp_path, base, method, targets):
    config, found = check_round_trip(tmp_path, *base, method)
    assert (config["peft_type"], config["target_modules"]) == ("LN_TUNING", targets)
    assert all(name.endswith(".ln_tuning_layers.weight") for name in found)


def test_beside_a_lora_norms_are_saved_whole(tmp_path, base):
    config, found = check_round_trip(tmp_path, *base, peft.chain(peft.lora(["q_proj"], rank=2), peft.norm_tuning()))
    assert config["peft_type"] == "LORA" and len(config["modules_to_save"]) == 3 and "base_model.model.model.norm.weight" in found


def test_a_value_head_goes_beside_norms(tmp_path, base):
    config, found = check_round_trip(tmp_path, *base, peft.chain(peft.norm_tuning(), peft.value_head(bias=False)))
    assert config["task_type"] == "SEQ_CLS" and found["base_model.model.score.weight"].shape == (1, 24)


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        ({}, "1.input_layernorm", r"missing: base_model.model.model.layers.1.input_layernorm.ln_tuning_layers.weight \[24\]"),
        ({"target_modules": ["norm"]}, "", None),
        (
            {"target_modules": ["q_proj"]},
            "",
            r"missing: .*layers.0.self_attn.q_proj.ln_tuning_layers.weight \[24, 24\]",
        ),
        ({"target_modules": None}, "", "target_modules=None names no module"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, base, config, drop, message):
    written, found = contents(GOLDENS / "ln_tuning")
    (tmp_path / hf_peft.CONFIG).write_text(json.dumps(written | config))
    safetensors.numpy.save_file({key: x for key, x in found.items() if not drop or drop not in key}, tmp_path / hf_peft.WEIGHTS)
    if message is None:  # more than it says it targets: what is in the file counts
        assert tree.size(hf_peft.load_adapter(tmp_path, base[0]).trainable) == 7 * 24
        return
    with pytest.raises(ValueError, match=message):
        hf_peft.load_adapter(tmp_path, base[0])


def test_norms_of_another_base_are_listed(tmp_path, base):
    model = models.build(models.preset("tiny-llama"))
    with pytest.raises(ValueError, match=r"misshapen: .*model.norm.ln_tuning_layers.weight is \[24\], expected \[32\]"):
        hf_peft.load_adapter(GOLDENS / "ln_tuning", model)


def test_what_peft_has_no_place_for_is_named_and_nothing_is_written(tmp_path, biased):
    model, params = biased
    method = peft.chain(peft.norm_tuning(), peft.bitfit())
    trainable = jax.tree.map(np.asarray, method.init(jax.random.key(0), params)[1])
    with pytest.raises(ValueError, match="PEFT has no biases beside norms alone"):
        hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))
    assert not (tmp_path / "a").exists()
