"""PEFT's own numbers for every method that it has: outputs, and the gradient of every trained tensor (third_party/peft/methods_golden.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import peft, tree, weights

GOLDEN = load_file(pathlib.Path(__file__).parents[1] / "goldens" / "peft_methods.safetensors")
BOTH = ["up", "down"]


def flat(tensor):
    return tensor.reshape(-1)


def same(tensor):
    return tensor


# case -> the method, and {PEFT's name: (ours, how to turn theirs into ours)}
CASES = {
    "ia3": (peft.ia3(BOTH, feedforward=["down"]), {"up.ia3_l": ("up/outputs", flat), "down.ia3_l": ("down/inputs", flat)}),
    "vera": (peft.vera(BOTH, rank=5), {"vera_lambda_b": ("lambda_b", same), "vera_lambda_d": ("lambda_d", same)}),
}


def theirs(case, kind, table):
    """Return `{our path: array}` of the values or gradients of a case."""
    found = {}
    for name, tensor in GOLDEN.items():
        if name.startswith(f"{case}|{kind}|"):
            module, _, rest = name.split("|")[2].partition(".")
            ours, turn = table[f"{module}.{rest}"] if f"{module}.{rest}" in table else table[rest]
            path = ours.replace("/", "/kernel/") if "/" in ours else f"{module}/kernel/{ours}"
            found[path] = jnp.asarray(turn(tensor))
    return found


def apply(params, x):
    return x + weights.dot(jnp.tanh(weights.dot(x, params["up"]["kernel"])), params["down"]["kernel"])


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case, key):
    method, table = CASES[case]
    x, g = jnp.asarray(GOLDEN["x"]), jnp.asarray(GOLDEN["g"])
    frozen, trainable = method.init(key, {name: {"kernel": jnp.asarray(GOLDEN[name].T)} for name in BOTH})
    (name,) = trainable
    values = theirs(case, "value", table)
    assert {path: a.shape for path, a in values.items()} == {path: a.shape for path, a in tree.flatten(trainable[name]).items()}
    loss = lambda trained: jnp.sum(apply(method.attach(frozen, {name: trained}), x) * g)  # noqa: E731
    values = tree.unflatten(values)
    np.testing.assert_allclose(apply(method.attach(frozen, {name: values}), x), GOLDEN[f"{case}|y"], rtol=1e-5, atol=1e-5)
    got = tree.flatten(jax.grad(loss)(values))
    for path, gradient in theirs(case, "grad", table).items():
        np.testing.assert_allclose(got[path], gradient, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("case", ["vera"])
def test_random_projections_are_the_ones_that_peft_draws(case, key):
    frozen, _ = CASES[case][0].init(key, {name: {"kernel": jnp.asarray(GOLDEN[name].T)} for name in BOTH})
    np.testing.assert_allclose(frozen[case]["a"].T, GOLDEN[f"{case}|frozen|A"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(frozen[case]["b"].T, GOLDEN[f"{case}|frozen|B"], rtol=1e-6, atol=1e-7)
