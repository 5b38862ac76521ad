"""An adapter that started from the weights stands in a PEFT folder as a plain LoRA of twice the rank."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree
from ftjax.hf import peft as hf_peft
from ftjax.peft import inits

TARGETS = ["q_proj", "down_proj"]


def calibrated(init, params, key):
    """An init as a run makes it, from what batches might show; one that needs none by its name."""
    leaves = {path: leaf for path, leaf in tree.flatten(params).items() if path in tree.matches(params, TARGETS, who="test")}
    name, _, keep = init.partition(" ")
    if name == "corda":
        inputs = {path: jax.random.normal(key, (leaf.shape[0], 100, leaf.shape[1])) for path, leaf in leaves.items()}
        return inits.corda({path: x.mT @ x for path, x in inputs.items()}, keep=keep)
    return inits.lora_ga({path: jax.random.normal(key, leaf.shape) for path, leaf in leaves.items()}) if name == "lora_ga" else name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "corda task", "corda knowledge", "lora_ga"])
def test_what_is_read_back_is_the_same_model(init, rslora, base, key, tmp_path):
    model, params = base
    init = calibrated(init, params, key)
    method = peft.lora(TARGETS, rank=3, alpha=5, init=init, rslora=rslora, rank_pattern={"down_proj": 2})
    frozen, start = method.init(key, params)
    now = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), start)
    hf_peft.save_adapter(tmp_path / "out", model, now, method.plan(params), frozen=frozen)
    assert {json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]} <= {6, 4}
    adapter = hf_peft.load_adapter(tmp_path / "out", model)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    trained, read, untrained = (
        np.asarray(model.apply(p, tokens)[0])
        for p in (method.attach(frozen, now), adapter.method.attach(adapter.join(params), adapter.trainable), params)
    )
    np.testing.assert_allclose(read, trained, atol=1e-5 * np.abs(trained).max())
    assert np.abs(trained - untrained).max() > 0.01 * np.abs(trained).max()


def test_without_the_frozen_tree_nothing_is_written(base, key, tmp_path):
    model, params = base
    method = peft.lora(["q_proj"], rank=2, init="pissa")
    with pytest.raises(ValueError, match="pass frozen=frozen"):
        hf_peft.save_adapter(tmp_path / "out", model, method.init(key, params)[1], method.plan(params))
    assert not (tmp_path / "out").exists()
