"""The reference of a method: its frozen tree, with copies of what is trained in full."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax import losses, peft, scoring, train, tree
from ftjax.types import Batch
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


def memory(base, batch, *, anchor=None, cached=False):
    """Return the memory of a compiled DPO step of an adapter; its reference is the frozen tree, or `anchor`, or `cached` in the batch."""
    method, look = peft.lora("all-linear", rank=2), partial(scoring.score, toy.MODEL, chunk_tokens=4, outputs=("logps",))
    frozen, trainable = jax.eval_shape(method.init, jax.random.key(0), base)
    state = jax.eval_shape(lambda trainable: train.init_state(jax.random.key(0), trainable, method, optax.adam(0.1)), trainable)

    def step(state, frozen, anchor, batch):
        def complete(frozen, batch):
            return losses.with_reference(batch, look(peft.reference(frozen) if anchor is None else anchor, batch))

        options = {} if cached else {"complete": complete}
        return train.make_train_step(look, method, losses.dpo, optax.adam(0.1), **options)(state, frozen, batch)

    return jax.jit(step, donate_argnums=0).lower(state, frozen, anchor, batch).compile().memory_analysis()


def test_a_compiled_step_of_an_adapter_holds_no_second_model():
    d, f, layers = 256, 512, 3
    shapes = {"embed_tokens/kernel": (64, d), "layers/mlp/up_proj/kernel": (layers, d, f), "layers/mlp/down_proj/kernel": (layers, f, d)}
    base = tree.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in (shapes | {"norm/scale": (d,)}).items()})
    ids, mask = (jax.ShapeDtypeStruct((2, 2, 9), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ids, mask, ids, ids)
    live, second = memory(base, batch), memory(base, batch, anchor=base)
    cached = memory(base, dataclasses.replace(batch, reference_logps=mask), cached=True)
    assert live.argument_size_in_bytes == cached.argument_size_in_bytes - 4 * mask.size
    assert second.argument_size_in_bytes - live.argument_size_in_bytes == tree.num_bytes(base)
    assert live.temp_size_in_bytes - cached.temp_size_in_bytes < tree.num_bytes(base) / 10
