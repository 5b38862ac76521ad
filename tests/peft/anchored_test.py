"""The reference of a method: its frozen tree, with copies of what is trained in full."""

import jax
import numpy as np
import pytest

from ftjax import peft
from tests import toy


def test_an_adapter_needs_no_copy(key):
    params, method = toy.init(key), peft.lora("all-linear", rank=2)
    frozen, _ = peft.anchored(method).init(key, params)
    assert peft.REFERENCE not in frozen
    for leaf, same in zip(jax.tree.leaves(peft.reference(frozen)), jax.tree.leaves(params), strict=True):
        assert leaf is same


def test_what_is_trained_in_full_is_copied_and_nothing_else(key):
    params, method = toy.init(key), peft.chain(peft.lora("all-linear", rank=2), peft.full("norm/scale"))
    frozen, trainable = peft.anchored(method).init(key, params)
    assert jax.tree.map(np.shape, frozen[peft.REFERENCE]) == {"norm": {"scale": params["norm"]["scale"].shape}}
    jax.tree.map(np.testing.assert_array_equal, peft.reference(frozen), params)
    moved = jax.tree.map(lambda x: x + 1, trainable)
    attached, plain = peft.anchored(method).attach(frozen, moved), method.attach(method.init(key, params)[0], moved)
    jax.tree.map(np.testing.assert_array_equal, attached, plain)
    jax.tree.map(np.testing.assert_array_equal, peft.reference(frozen), params)


def test_the_model_itself_fills_the_holes_and_what_methods_keep_beside_it_is_left_out(key):
    params, method = toy.init(key), peft.chain(peft.vera(r".*up_proj/kernel", rank=2), peft.full("norm/scale"))
    frozen, _ = method.init(key, params)
    assert frozen.keys() > params.keys()
    found = peft.reference(frozen, params)
    assert found.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_hole_without_a_copy_is_named(key):
    frozen, _ = peft.full("norm/scale").init(key, toy.init(key))
    with pytest.raises(ValueError, match=r"'norm/scale' is trained and there is no copy of it: wrap the method in peft.anchored"):
        peft.reference(frozen)
