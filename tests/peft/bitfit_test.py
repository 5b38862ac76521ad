import jax
import jax.numpy as jnp
import pytest

from ftjax import models, peft, tree


def trained(key, preset, method):
    return jax.eval_shape(method.init, key, jax.eval_shape(models.build(models.preset(preset)).init, key))[1]


def test_bitfit_trains_the_biases_that_are_there(key):
    trainable = trained(key, "qwen2.5-0.5b", peft.bitfit())
    assert {path.split("/")[-2:][0] for path in tree.flatten(trainable)} == {"q_proj", "k_proj", "v_proj"}
    assert tree.size(trainable) == 24 * (896 + 128 + 128)


def test_a_model_without_biases_is_refused_and_told_what_it_has(key):
    with pytest.raises(ValueError, match=r"bitfit: this model has no biases to train. norm_tuning\(\)"):
        trained(key, "tiny-llama", peft.bitfit())
    with pytest.raises(ValueError, match="no biases"):
        peft.bitfit().plan(jax.eval_shape(models.build(models.preset("tiny-llama")).init, key))


def test_norm_tuning_trains_every_norm(key):
    assert tree.size(trained(key, "llama-3-8b", peft.norm_tuning())) == (2 * 32 + 1) * 4096


def test_some_layers_are_trained_and_the_others_stay(key):
    params = {"layers": {"q_proj": {"bias": jnp.zeros((3, 6))}, "norm": {"scale": jnp.ones((3, 4))}}}
    for method, kind, path in (
        (peft.bitfit(layers="last 2", name="mine"), "bitfit", "layers/q_proj/bias"),
        (peft.norm_tuning(layers=[0], name="mine"), "norm_tuning", "layers/norm/scale"),
    ):
        frozen, trainable = method.init(key, params)
        (row,) = method.plan(params)
        moved = tree.flatten(method.attach(frozen, jax.tree.map(lambda x: x + 1, trainable)))[path] - tree.flatten(params)[path]
        assert row.known_as == kind and [bool(layer.all()) for layer in moved] == [n in row.options["layers"] for n in range(3)]
