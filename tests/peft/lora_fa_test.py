"""LoRA-FA: LoRA's product with A out of the optimiser's sight, and less memory in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree, weights

WIDE, LAYERS, TOKENS = 64, 8, 512


@pytest.fixture
def params(key):
    return {"layers": {"q_proj": {"kernel": jax.random.normal(key, (LAYERS, WIDE, WIDE)) / WIDE**0.5}}}


def through(params, x):
    """Products and nothing else, so that what the backward pass keeps is what the weights need."""
    return jax.lax.scan(lambda x, w: (weights.dot(x, w), None), x, params["layers"]["q_proj"]["kernel"])[0]


def test_it_computes_what_lora_computes_with_the_same_factors(params, key):
    method = peft.lora_fa(["q_proj"], rank=4, alpha=8)
    frozen, trainable = method.init(key, params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    both = {"lora": tree.combine(frozen["lora_fa"], trainable["lora_fa"])}
    x = jax.random.normal(key, (3, WIDE))
    loss = lambda attach: lambda trainable: jnp.sum(jnp.tanh(through(attach(trainable), x)))  # noqa: E731
    got, got_grad = jax.value_and_grad(loss(lambda t: method.attach(frozen, t)))(trainable)
    want, want_grad = jax.value_and_grad(loss(lambda t: peft.lora(["q_proj"], rank=4, alpha=8).attach(params, t)))(both)
    np.testing.assert_array_equal(got, want)
    path = "layers/q_proj/kernel/b"
    assert list(tree.flatten(got_grad)) == [f"lora_fa/{path}"]
    np.testing.assert_allclose(tree.flatten(got_grad)[f"lora_fa/{path}"], tree.flatten(want_grad)[f"lora/{path}"], rtol=1e-5)


def test_the_backward_pass_keeps_no_input(params, key):
    """LoRA keeps x `[tokens, i]` of every layer for A's gradient, LoRA-FA x A `[tokens, r]`."""

    def temporary(method):
        frozen, trainable = method.init(key, params)
        loss = lambda trainable, frozen, x: jnp.sum(through(method.attach(frozen, trainable), x))  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, jnp.ones((TOKENS, WIDE))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    inputs = LAYERS * TOKENS * WIDE * 4
    lora, frozen_a = (temporary(make(["q_proj"], rank=2)) for make in (peft.lora, peft.lora_fa))
    assert lora - frozen_a > 0.9 * inputs and frozen_a < 0.6 * inputs


def test_the_same_key_makes_the_same_a_and_another_key_another(params, key):
    a = [tree.flatten(peft.lora_fa(rank=2).init(k, params)[0])["lora_fa/layers/q_proj/kernel/a"] for k in (key, key, jax.random.key(1))]
    np.testing.assert_array_equal(a[0], a[1])
    assert not np.array_equal(a[0], a[2])


def test_a_later_method_may_not_train_a(params, key):
    method = peft.chain(peft.lora_fa(rank=2), peft.full(".*", exclude=["q_proj"]))
    params["norm"] = {"scale": jnp.ones(WIDE)}
    frozen, trainable = method.init(key, params)
    assert list(tree.flatten(trainable)) == ["full/norm/scale", "lora_fa/layers/q_proj/kernel/b"]
    assert set(method.attach(frozen, trainable)) == set(params)


def test_what_cannot_learn_or_was_not_made_by_init_is_refused(params, key):
    with pytest.raises(ValueError, match="'a_zero' the frozen A would be zero"):
        peft.lora_fa(init="a_zero")
    with pytest.raises(ValueError, match="use the one that init returned"):
        peft.lora_fa(rank=2).attach(params, peft.lora_fa(rank=2).init(key, params)[1])
