"""An adapter that was trained with another RoPE than its base's says so, and no model with another takes it."""

import dataclasses

import jax
import pytest

from ftjax import models, peft
from ftjax.hf import adapter, architecture
from ftjax.hf import peft as hf_peft

BASE = models.preset("tiny-llama")
LONG = models.stretch(BASE, {"rope_type": "linear", "factor": 4.0})


@pytest.fixture(params=["PEFT's form", "ftjax's own"])
def load(request, tmp_path):
    """Write an adapter of a stretched model; return `load(config)`."""
    model, options = models.build(LONG), {"targets": ["q_proj"], "rank": 1}
    method = peft.lora(**options)
    params = jax.eval_shape(model.init, jax.random.key(0))
    _, trainable = method.init(jax.random.key(0), params)
    if request.param == "PEFT's form":
        hf_peft.save_adapter(tmp_path / "adapter", model, trainable, method.plan(params))
        form = hf_peft
    else:
        adapter.save_adapter(tmp_path / "adapter", [("lora", options)], trainable)
        form = adapter
    architecture.write(tmp_path / "adapter", LONG)
    return lambda config: form.load_adapter(tmp_path / "adapter", models.build(config))


def test_a_folder_says_what_it_was_trained_in(load, tmp_path):
    assert architecture.trained_in(tmp_path / "adapter", BASE) == LONG
    assert architecture.trained_in(tmp_path, BASE) == BASE
    other = dataclasses.replace(BASE, dtype="bfloat16")  # what is no RoPE is the base's
    assert architecture.trained_in(tmp_path / "adapter", other) == dataclasses.replace(LONG, dtype="bfloat16")


def test_no_model_with_another_rope_takes_it(load):
    assert load(LONG)
    message = r"was trained with the RoPE linear \(rope_theta 10000, factor 4\), and this model has the RoPE default \(rope_theta 10000\)"
    with pytest.raises(ValueError, match=message):
        load(BASE)
