"""What the tests of PEFT's folders share: the tiny models that the golden adapters were made on, and what an adapter computes there."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ftjax import models, tree, weights
from ftjax.hf import folder, load
from ftjax.hf import names as hf_names
from ftjax.hf import peft as hf_peft

GOLDENS = Path(__file__).parents[1] / "goldens" / "peft"  # third_party/peft/folder_golden.py
TOKENS = jnp.asarray((np.arange(10, dtype=np.int32) * 11 % 61)[None])


def loaded(name):
    checkpoint = folder.read(GOLDENS / name)
    model = models.build(models.config_from_hf(checkpoint.config))
    return model, load.load_params(checkpoint, model)


@pytest.fixture(scope="session")
def base():
    """The model and its parameters."""
    return loaded("base")


@pytest.fixture(scope="session")
def biased():
    """A Qwen2 whose q, k and v have biases, and its parameters."""
    return loaded("base_qwen2")


def logits(model, params):
    hidden, _ = model.apply(params, TOKENS)
    return model.unembed(model.head(params), hidden)[0]


def contents(target):
    config = json.loads((target / hf_peft.CONFIG).read_text())
    return config, safetensors.numpy.load_file(target / hf_peft.WEIGHTS)


def check_numbers(model, params, name):
    """Assert that logits, gradients and merged weights of a golden folder are PEFT's."""
    adapter, golden = hf_peft.load_adapter(GOLDENS / name, model), safetensors.numpy.load_file(GOLDENS / name / "check.safetensors")
    frozen = adapter.join(params)

    @jax.jit
    def measured(trainable):
        def loss(trainable):
            attached = adapter.method.attach(frozen, trainable)
            got = logits(model, attached)
            return jnp.sum(got * golden["G"]), (got, weights.dense(attached))

        return jax.grad(loss, has_aux=True)(trainable)

    gradient, (got, merged) = measured(adapter.trainable)
    close(got, np.load(GOLDENS / name / "logits.npy"), 1e-5, name)
    ours = hf_peft.contents(model, gradient, adapter.method.plan(params), frozen)[1]
    theirs = {key.removeprefix("grad|").replace(".modules_to_save", ""): x for key, x in golden.items() if key.startswith("grad|")}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        close(ours[key], value, 5e-5, key)
    flat = tree.flatten(merged)
    for key in [key for key in golden if key.startswith("merged|")]:
        path, layer = hf_names.path(key.removeprefix("merged|") + ".weight")
        leaf = flat[path] if layer is None else flat[path][layer]
        close(leaf.T if hf_names.is_transposed(path) else leaf, golden[key], 1e-5, key)


def close(got, want, tolerance, what=""):
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max(), what


def check_written(target, model, params, name, base):
    """Assert that a golden folder is written again with PEFT's fields and tensors."""
    adapter = hf_peft.load_adapter(GOLDENS / name, model)
    hf_peft.save_adapter(target, model, adapter.trainable, adapter.method.plan(params), base_name=base, frozen=adapter.join(params))
    (ours, found), (theirs, wanted) = contents(target), contents(GOLDENS / name)
    assert ours == {**theirs, "target_modules": sorted(theirs["target_modules"])}
    wanted = {key: value for key, value in wanted.items() if ".modules_to_save." not in key and ".original_module." not in key}  # copies
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def check_round_trip(target, model, params, method):
    """Assert that what is written computes the same when it is read, and is written again bitwise; return its config and tensors."""
    rng = np.random.default_rng(0)
    frozen, start = method.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape, np.float32)), start)
    hf_peft.save_adapter(target / "a", model, trainable, method.plan(params), frozen=frozen)
    adapter = hf_peft.load_adapter(target / "a", model)
    joined = adapter.join(params)
    want = logits(model, method.attach(frozen, trainable))
    np.testing.assert_array_equal(logits(model, adapter.method.attach(joined, adapter.trainable)), want)
    assert np.abs(np.asarray(want - logits(model, params))).max() > 0.01
    hf_peft.save_adapter(target / "b", model, adapter.trainable, adapter.method.plan(params), frozen=joined)
    for file in (hf_peft.CONFIG, hf_peft.WEIGHTS):
        assert (target / "a" / file).read_bytes() == (target / "b" / file).read_bytes()
    return contents(target / "a")
