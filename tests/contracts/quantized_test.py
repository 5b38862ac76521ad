"""Every method over a quantised base is what it is over the dense matrices that the base stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, quant, scoring, tree, weights
from tests import toy
from tests.contracts.methods_test import CASES, base, hidden, moved

BASE = quant.quantized("nf4", "layers/.*kernel", group=4, nested=True)
RIDING = [case for case in CASES if case.id not in ("full0", "loftq0")] + [  # which need the dense matrices
    pytest.param(peft.lora(rank=2, init="pissa"), id="pissa")
]


@pytest.mark.parametrize(
    ("method", "message"),
    [(peft.full("everything"), "QuantizedWeight, not a plain array"), (peft.loftq(group=4), "QuantizedWeight already.*put loftq first")],
)
def test_a_method_that_needs_dense_matrices_refuses_quantised_ones(method, message, key):
    with pytest.raises(ValueError, match=message):
        peft.chain(BASE, method).init(key, toy.init(key))


@pytest.mark.parametrize("method", RIDING)
def test_a_method_over_packed_matrices_is_that_over_dense_ones(method, key):
    params, batch = base(method, key), toy.batch(key)
    packed, _ = BASE.init(key, params)
    assert any(isinstance(leaf, quant.QuantizedWeight) for leaf in tree.flatten(packed).values())
    trees = [method.init(key, tree_) for tree_ in (packed, weights.dense(packed))]
    trainable = moved(trees[1][1], key)

    def outcome(trainable, frozen):
        out = hidden(method.attach(frozen, trainable), batch)
        return jnp.sum(jnp.sin(out)), out

    @jax.jit
    def outcomes(trainable, *frozen):
        return [jax.value_and_grad(outcome, has_aux=True)(trainable, one) for one in frozen]

    ((_, out), gradient), ((_, expected), expected_gradient) = outcomes(trainable, *(frozen for frozen, _ in trees))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(out, hidden(packed, batch), atol=1e-3)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * (1 + np.abs(two).max()))


def test_every_format_has_a_method():
    assert set(quant.METHODS) == set(quant.SPECS)


@pytest.mark.parametrize("format", quant.METHODS)
def test_qlora_is_a_chain(format, key):
    params, batch = toy.init(key), toy.batch(key)
    method = peft.chain(quant.METHODS[format]("layers/.*kernel", group=4), peft.lora("all-linear", rank=2))
    frozen, trainable = method.init(key, params)
    assert set(trainable) == {"lora"} and [row.method for row in method.plan(params)] == [format, "lora"]
    got = losses.sft(scoring.score(toy.MODEL, method.attach(frozen, trainable), batch), batch)[0].value()
    dense = losses.sft(scoring.score(toy.MODEL, weights.dense(frozen), batch), batch)[0].value()
    assert got == pytest.approx(dense, rel=1e-5) and got != losses.sft(scoring.score(toy.MODEL, params, batch), batch)[0].value()
