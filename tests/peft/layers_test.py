import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree, weights
from ftjax.peft.layers import chosen
from tests import toy

METHODS = {
    "lora": peft.lora("all-linear", rank=2, layers="last 2"),
    "dora": peft.dora("all-linear", rank=2, layers="last 2"),
    "lora_fa": peft.lora_fa("all-linear", rank=2, layers=[1, 2]),
    "pissa": peft.lora("all-linear", rank=2, init="pissa", layers="last 2"),
    "ia3": peft.ia3("all-linear", layers=[-1, 1]),
    "vera": peft.vera(rank=4, layers=slice(1, None)),
    "boft": peft.boft(block_size=2, factors=2, layers="last 2"),
    "full": peft.full("all-linear", layers="last 2"),
}


def jumped(trainable):
    return jax.tree.map(lambda x: x + 0.3, trainable)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_only_the_chosen_layers_change_and_only_they_are_stored(key, method):
    params = toy.init(key)
    frozen, trainable = method.init(key, params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trainable)} == {2}
    (row,) = method.plan(params)
    assert row.options["layers"] == (1, 2)
    dense = tree.flatten(weights.dense(method.attach(frozen, jumped(trainable))))
    for path, leaf in tree.flatten(params).items():
        same = [np.array_equal(*pair) for pair in zip(leaf, dense[path], strict=True)]
        assert same == [True, False, False] if path in row.paths else all(same), path


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_layer_that_is_not_chosen_gives_bit_for_bit_what_it_gave(key, method):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(key))
    frozen, trainable = method.init(key, params)
    x = jax.random.normal(key, (2, 3, toy.DIM)).astype(jnp.bfloat16)
    first = [
        jax.tree.map(lambda leaf: leaf[0], p["layers"]["mlp"]["up_proj"]["kernel"])
        for p in (method.attach(frozen, jumped(trainable)), params)
    ]
    np.testing.assert_array_equal(*(weights.dot(x, w) for w in first))


def test_the_chosen_layers_start_as_they_do_when_all_are_trained(key):
    every = peft.lora("all-linear", rank=2).init(key, toy.init(key))[1]
    some = METHODS["lora"].init(key, toy.init(key))[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b), every, some)


@pytest.mark.parametrize(
    "layers, want", [([3, 0], (0, 3)), ("first 2", (0, 1)), ("last 1", (3,)), (slice(None, None, 2), (0, 2)), ([-1, 3], (3,))]
)
def test_layers_may_be_said_in_many_ways(layers, want):
    assert chosen(layers, 4) == want


@pytest.mark.parametrize(
    "layers, message",
    [
        ("last 5", "from 1 to 4"),
        ("lst 2", "first n"),
        ([4], "no layer 4; the model has 4"),
        (slice(4, None), "chooses none"),
        ([], "chooses none"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        chosen(layers, 4)


@pytest.mark.parametrize("method", [peft.ia3, peft.full])
def test_what_is_not_stacked_is_refused(key, method):
    with pytest.raises(ValueError, match="not one of the stacked layers"):
        method(r"embed_tokens/kernel", layers=[0]).init(key, toy.init(key))


def test_a_start_in_the_weights_is_not_cut_from_outside(key):
    """What LoRA is relative to would stay for the layers that are not trained, and change them."""
    with pytest.raises(ValueError, match="'lora' keeps where it started for all layers; say which in its own argument `layers`"):
        peft.on_layers(peft.lora("all-linear", rank=2, init="pissa"), "last 1").init(key, toy.init(key))
