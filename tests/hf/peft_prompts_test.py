"""Soft prompts in PEFT's folders: PEFT's numbers from PEFT's files, PEFT's files from PEFT's parameters, and ours back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ftjax import models, peft, tree
from ftjax.hf import peft as hf_peft
from ftjax.peft.prefix_tuning import split
from tests.hf.conftest import GOLDENS, close, logits

ENCODED = {
    "prompt_tuning": peft.prompt_tuning(4, init="random"),
    "p_tuning": peft.p_tuning(4, hidden_size=5),
    "p_tuning_lstm": peft.p_tuning(4, hidden_size=5, encoder="lstm"),
    "prefix_tuning": peft.prefix_tuning(4),
    "prefix_tuning_mlp": peft.prefix_tuning(4, hidden_size=5),
}
WIDTH = 12
names = pytest.mark.parametrize("name", ENCODED)


def method_of(name):
    return name.removesuffix("_mlp").removesuffix("_lstm")


def of_lstm(found, kind):
    """Return the fields of PyTorch's layers, or their gradients: that of a sum of two biases is that of each."""
    fields = {}
    for layer in range(sum(key.endswith("reverse") for key in found) // 4):
        both = {
            part: jnp.stack([found[f"lstm_head.{part}_l{layer}{way}"] for way in ("", "_reverse")])
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        bias = both["bias_ih"] + both["bias_hh"] if kind == "parameter" else both["bias_ih"]
        fields |= {f"input{layer + 1}": both["weight_ih"].transpose(0, 2, 1), f"state{layer + 1}": both["weight_hh"].transpose(0, 2, 1)}
        fields[f"bias{layer + 1}"] = bias
    return fields


def theirs(name, golden, kind):
    """Return PEFT's parameters (or gradients) of an encoder as our trainable tree."""
    found = {key.removeprefix(f"{kind}|"): jnp.asarray(value) for key, value in golden.items() if key.startswith(f"{kind}|")}
    if name == "prefix_tuning":
        fields = split(found["embedding.weight"], width=WIDTH)
    else:
        fields = {"embedding": found.pop("embedding.weight")}
        fields |= of_lstm({key: found.pop(key) for key in list(found) if key.startswith("lstm_head.")}, kind)
        for key, value in found.items():  # mlp_head.0.weight, mlp_head.2.weight, …
            layer, what = re.fullmatch(r"\w+\.(\d)\.(weight|bias)", key).groups()
            fields["wb"[what == "bias"] + str(int(layer) // 2 + 1)] = value.T if what == "weight" else value
    method = method_of(name)
    return {method: tree.unflatten({f"{peft.SOFT_PROMPTS[method].slot}/{field}": value for field, value in fields.items()})}


@names
def test_logits_are_those_of_peft(base, name):
    model, params = base
    adapter = hf_peft.load_adapter(GOLDENS / name, model)
    assert adapter.kind == method_of(name)
    got = logits(model, adapter.method.attach(adapter.join(params), adapter.trainable))
    close(got, np.load(GOLDENS / name / "logits.npy"), 1e-5)
    assert np.abs(got - logits(model, params)).max() > 0.01


@names
def test_gradients_through_the_encoder_are_those_of_peft(base, name):
    model, params = base
    golden = safetensors.numpy.load_file(GOLDENS / name / "check.safetensors")

    def loss(trainable):
        return jnp.sum(logits(model, ENCODED[name].attach(params, trainable)) * golden["G"])

    gradient = tree.flatten(jax.jit(jax.grad(loss))(theirs(name, golden, "parameter")))
    wanted = tree.flatten(theirs(name, golden, "gradient"))
    assert gradient.keys() == wanted.keys()
    assert gradient.keys() == tree.flatten(jax.eval_shape(ENCODED[name].init, jax.random.key(0), params)[1]).keys()
    for path, value in wanted.items():
        close(gradient[path], value, 5e-5, path)


@names
def test_the_fields_and_the_tensor_are_those_that_peft_writes(base, name, tmp_path):
    model, params = base
    trainable = theirs(name, safetensors.numpy.load_file(GOLDENS / name / "check.safetensors"), "parameter")
    hf_peft.save_adapter(tmp_path / "a", model, trainable, ENCODED[name].plan(params), base_name="base")
    ours, wanted = (json.loads((path / hf_peft.CONFIG).read_text()) for path in (tmp_path / "a", GOLDENS / name))
    assert ours == wanted
    ours, wanted = (safetensors.numpy.load_file(path / hf_peft.WEIGHTS) for path in (tmp_path / "a", GOLDENS / name))
    assert ours.keys() == wanted.keys()
    close(ours["prompt_embeddings"], wanted["prompt_embeddings"], 1e-6)


@names
def test_a_round_trip_is_bitwise(base, name, tmp_path):
    model, params = base
    first = hf_peft.load_adapter(GOLDENS / name, model)
    for target in ("a", "b"):
        hf_peft.save_adapter(tmp_path / target, model, first.trainable, first.method.plan(params), base_name="org/base")
        again = hf_peft.load_adapter(tmp_path / target, model)
        assert (again.options, again.base_name) == (first.options, "org/base")
        for path, leaf in tree.flatten(first.trainable).items():
            np.testing.assert_array_equal(tree.flatten(again.trainable)[path], leaf)
        first = again
    for file in (hf_peft.CONFIG, hf_peft.WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_peft_has_the_prompt_of_a_model_that_scales_embeddings_after_that(tmp_path):
    model = models.build(models.preset("tiny-gemma3"))
    method = peft.prompt_tuning(2)
    params = {"embed_tokens": {"kernel": jax.random.normal(jax.random.key(0), (model.config.vocab_size, model.config.hidden_size))}}
    _, trainable = method.init(jax.random.key(1), params)
    hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))
    written = safetensors.numpy.load_file(tmp_path / "a" / hf_peft.WEIGHTS)["prompt_embeddings"]
    embedding = trainable["prompt_tuning"]["prompt"]["embedding"]
    np.testing.assert_allclose(written, embedding * model.config.hidden_size**0.5, rtol=1e-6)
    read = hf_peft.load_adapter(tmp_path / "a", model).trainable["prompt_tuning"]["prompt"]["embedding"]
    np.testing.assert_allclose(read, embedding, rtol=1e-6)


def test_another_method_beside_it_is_refused_and_nothing_is_written(base, tmp_path):
    model, params = base
    method = peft.chain(peft.prompt_tuning(2), peft.lora("all-linear", rank=1))
    _, trainable = method.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="not yet: 'prompt_tuning' and 'lora' in one folder"):
        hf_peft.save_adapter(tmp_path / "a", model, trainable, method.plan(params))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": 5}, r"misshapen: prompt_embeddings is \[4, 24\], expected \[5, 24\]"),
        ({"token_dim": 32}, "token_dim=32, and the base has 24"),
        ({"num_layers": 2}, "num_layers=2, and the base has 3"),
        ({"num_transformer_submodules": 2}, "a decoder has 1"),
        ({"modules_to_save": ["norm"]}, r"not yet: modules_to_save=\['norm'\]"),
        ({"peft_type": "PROMPT_TUNNING"}, "nearest: 'PROMPT_TUNING'"),
    ],
)
def test_a_folder_that_does_not_fit_says_why(base, change, message, tmp_path):
    config = json.loads((GOLDENS / "prompt_tuning" / hf_peft.CONFIG).read_text()) | change
    (tmp_path / hf_peft.CONFIG).write_text(json.dumps(config))
    (tmp_path / hf_peft.WEIGHTS).write_bytes((GOLDENS / "prompt_tuning" / hf_peft.WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=message):
        hf_peft.load_adapter(tmp_path, base[0])


def test_a_file_with_other_tensors_lists_what_is_missing_and_extra(base, tmp_path):
    (tmp_path / hf_peft.CONFIG).write_bytes((GOLDENS / "prompt_tuning" / hf_peft.CONFIG).read_bytes())
    safetensors.numpy.save_file({"prompt": np.zeros((4, 24), np.float32)}, tmp_path / hf_peft.WEIGHTS)
    with pytest.raises(ValueError, match=r"(?s)extra: prompt \[4, 24\].*missing: prompt_embeddings \[4, 24\]"):
        hf_peft.load_adapter(tmp_path, base[0])
