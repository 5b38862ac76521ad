"""LoftQ in folders: a plain LoRA for PEFT where bitsandbytes makes the same base, else ftjax's own form, which makes it again."""

import json

import jax
import numpy as np
import pytest

from ftjax import models, peft, quant, tree
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import peft as hf_peft

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base():
    """A model whose rows divide into groups of 64, and its parameters."""
    model = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | {"hidden_size": 64, "intermediate_size": 64}))
    return model, model.init(jax.random.key(0))


def started(options, params):
    method = peft.loftq(TARGETS, rank=2, alpha=3, **options)
    frozen, trainable = method.init(jax.random.key(1), params)
    return method, frozen, jax.tree.map(lambda x: x + 0.05, trainable)


def assert_equal(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), got, want)


def test_after_one_iteration_peft_has_a_lora_for_a_base_in_nf4(base, tmp_path):
    model, params = base
    method, frozen, trainable = started({}, params)
    hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params), frozen=frozen)
    config = json.loads((tmp_path / "a" / hf_peft.CONFIG).read_text())
    assert (config["peft_type"], config["init_lora_weights"], config["r"], config["lora_alpha"]) == ("LORA", True, 2, 3)
    adapter, want = hf_peft.load_adapter(tmp_path / "a", model), method.attach(frozen, trainable)
    assert adapter.kind == "loftq"
    assert_equal(adapter.method.attach(adapter.join(params), adapter.trainable), want)
    packed, _ = quant.nf4(TARGETS).init(jax.random.key(0), params)  # as bitsandbytes does
    assert_equal(peft.lora(TARGETS, rank=2, alpha=3).attach(packed, {"lora": trainable["loftq"]}), want)


@pytest.mark.parametrize("options", [{"iterations": 2}, {"format": "int4"}, {"group": 32}, {"nested": False}])
def test_a_base_that_bitsandbytes_does_not_make_is_not_for_peft(options, base, tmp_path):
    model, params = base
    method = peft.loftq(["q_proj"], rank=2, **options)
    trainable = jax.eval_shape(method.init, jax.random.key(0), params)[1]
    with pytest.raises(ValueError, match=f"PEFT has LORA with {next(iter(options))}="):
        hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))


def test_our_own_form_makes_the_base_again(base, tmp_path):
    model, params = base
    options = {"iterations": 2, "svd_iterations": 1, "format": "int4", "group": 32}
    method, frozen, trainable = started(options, params)
    hf_adapter.save_adapter(tmp_path / "b", [("loftq", {"targets": TARGETS, "rank": 2, "alpha": 3, **options})], trainable)
    attached = hf_adapter.load_adapter(tmp_path / "b", model).attach(params)
    assert_equal(attached, method.attach(frozen, trainable))
    assert isinstance(tree.flatten(attached)["layers/mlp/down_proj/kernel"].base, quant.QuantizedWeight)
