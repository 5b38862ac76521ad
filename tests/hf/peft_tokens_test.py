"""Rows of the embedding in PEFT's folders, alone and beside a LoRA: PEFT's numbers from its files, ours back bitwise."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ftjax import models, peft, tree, weights
from ftjax.hf import peft as hf_peft
from tests.hf.conftest import GOLDENS, contents, logits

EMBEDDING = "embed_tokens/kernel"


@pytest.mark.parametrize(("name", "ids", "key"), [("tokens", (5, 22, 44), "."), ("lora_tokens", (0, 3, 16), ".token_adapter.")])
def test_logits_gradients_and_merged_weights_are_those_of_peft(base, name, ids, key):
    model, params = base
    adapter, golden = hf_peft.load_adapter(GOLDENS / name, model), safetensors.numpy.load_file(GOLDENS / name / "check.safetensors")

    @jax.jit
    def measured(trainable):
        def loss(trainable):
            got = logits(model, adapter.method.attach(adapter.join(params), trainable))
            return jnp.sum(got * golden["G"]), got

        return jax.grad(loss, has_aux=True)(trainable)

    gradient, got = measured(adapter.trainable)
    want = np.load(GOLDENS / name / "logits.npy")
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    order = np.argsort(np.argsort([id for id in json_ids(name)]))
    theirs = golden[f"grad|base_model.model.model.embed_tokens{key}trainable_tokens_delta"]
    ours = np.asarray(gradient["tokens"]["embed_tokens"]["kernel"]["rows"])[order]
    assert np.abs(theirs).max() > 0.1 and np.abs(ours - theirs).max() <= 5e-5 * np.abs(theirs).max()
    merged = tree.flatten(weights.dense(adapter.method.attach(adapter.join(params), adapter.trainable)))[EMBEDDING]
    np.testing.assert_array_equal(merged, golden["merged|model.embed_tokens"])
    assert adapter.method.plan(params)[-1].options["ids"] == ids


def json_ids(name):
    config = json.loads((GOLDENS / name / hf_peft.CONFIG).read_text())
    return config.get("token_indices") or config["trainable_token_indices"]


@pytest.mark.parametrize("name", ["tokens", "lora_tokens"])
def test_the_fields_and_tensors_are_those_that_peft_writes(tmp_path, base, name):
    model, params = base
    adapter = hf_peft.load_adapter(GOLDENS / name, model)
    hf_peft.save_adapter(tmp_path / "a", model, adapter.trainable, adapter.method.plan(params), base_name="base")
    (ours, found), (theirs, wanted) = contents(tmp_path / "a"), contents(GOLDENS / name)
    field = "token_indices" if name == "tokens" else "trainable_token_indices"
    order = np.argsort(theirs[field])
    assert ours == {**theirs, field: sorted(theirs[field])}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value[order] if "token" in key.rpartition(".")[2] else value)


def test_a_tied_head_sees_the_rows_and_the_folder_says_so(tmp_path, base):
    config = dataclasses.replace(base[0].config, tie_word_embeddings=True)
    model = models.build(config)
    params = {name: branch for name, branch in base[1].items() if name != "lm_head"}
    method = peft.tokens([5, 22])
    frozen, trainable = method.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: x + 1, trainable)
    hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))
    _, found = contents(tmp_path / "a")
    assert sorted(found) == [f"base_model.model.{module}.trainable_tokens_delta" for module in ("lm_head", "model.embed_tokens")]
    adapter = hf_peft.load_adapter(tmp_path / "a", model)
    got, want = logits(model, adapter.method.attach(params, adapter.trainable)), logits(model, method.attach(frozen, trainable))
    np.testing.assert_array_equal(got, want)
    assert np.abs(np.asarray(want - logits(model, params)))[:, 22].max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_indices": [5, 22, 61]}, r"expected ids from 0 to 60 of embed_tokens, each once, not \[5, 22, 61\]"),
        ({"token_indices": [5, 5, 22]}, "each once"),
        ({"token_indices": [5, 22]}, r"trainable_tokens_delta is \[3, 24\], expected \[2, 24\]"),
        ({"token_indices": []}, "expected ids"),
        ({"target_modules": ["lm_head"]}, "not yet: trainable tokens of .*lm_head"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, base, change, message):
    config, found = contents(GOLDENS / "tokens")
    (tmp_path / hf_peft.CONFIG).write_text(json.dumps(config | change))
    safetensors.numpy.save_file(found, tmp_path / hf_peft.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        hf_peft.load_adapter(tmp_path, base[0])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (peft.chain(peft.ia3(), peft.tokens([3])), "beside a LoRA only, not beside IA3"),
        (peft.chain(peft.bottleneck(width=2), peft.tokens([3])), "beside a LoRA only, not beside bottleneck"),
        (peft.tokens([3], targets="lm_head/kernel"), "rows of 'embed_tokens/kernel' by one rule, not of lm_head/kernel"),
    ],
)
def test_what_peft_has_no_place_for_is_named_and_nothing_is_written(tmp_path, base, method, message):
    model, params = base
    _, trainable = method.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=message):
        hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))
    assert not (tmp_path / "a").exists()
