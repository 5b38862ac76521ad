"""PEFT's own numbers for every method that it has: outputs, and the gradient of every trained tensor.

They are made by third_party/peft/methods_golden.py.
"""

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


def turned(tensor):
    return np.swapaxes(tensor, -1, -2)


def low_rank(prefix):
    return {f"{prefix}_A": ("a", turned), f"{prefix}_B": ("b", turned)}


LOHA = {"hada_w1_b": ("a1", turned), "hada_w1_a": ("b1", turned), "hada_w2_b": ("a2", turned), "hada_w2_a": ("b2", turned)}
LOKR = {f"lokr_w{n}_{x}": (f"w{n}_{y}", turned) for n in "12" for x, y in ("ab", "ba")} | {f"lokr_w{n}": (f"w{n}", turned) for n in "12"}
RANDLORA = {"randlora_lambda": ("lambdas", same), "randlora_gamma": ("gammas", same)}
MISS = {"miss_block": ("block", same)}
OFT = {"oft_R.weight": ("skew", same)}
BOFT = {"boft_R": ("blocks", same), "boft_s": ("outputs", flat)}


# case -> the method, and {PEFT's name: (ours, how to turn theirs into ours)}
CASES = {
    "ia3": (peft.ia3(BOTH, feedforward=["down"]), {"up.ia3_l": ("up/outputs", flat), "down.ia3_l": ("down/inputs", flat)}),
    "vera": (peft.vera(BOTH, rank=5), {"vera_lambda_b": ("lambda_b", same), "vera_lambda_d": ("lambda_d", same)}),
    "hira": (peft.hira(BOTH, rank=3), low_rank("hira")),
    "loha": (peft.loha(BOTH, rank=3, alpha=6), LOHA),
    "lokr": (peft.lokr(BOTH, rank=1, alpha=2), LOKR),
    "lokr_both": (peft.lokr(BOTH, rank=1, alpha=2, decompose_both=True, decompose_factor=4), LOKR),
    "lokr_full": (peft.lokr(BOTH, rank=4, alpha=2), LOKR),
    "miss": (peft.miss(BOTH, rank=4), MISS),
    "miss_uneven": (peft.miss(BOTH, rank=5), MISS),
    "miss_mini": (peft.miss(BOTH, rank=4, form="mini", mini_rank=2), MISS),
    "miss_bat": (peft.miss(BOTH, rank=4, form="bat"), {"miss_block": ("blocks", turned)}),
    "shira": (peft.shira(BOTH, rank=2), {"shira_weight": ("values", same)}),
    "randlora": (peft.randlora(BOTH, rank=3, alpha=6), RANDLORA),
    "randlora_sparse": (peft.randlora(BOTH, rank=3, alpha=6, bases="sparse"), RANDLORA),
    "oft": (peft.oft(BOTH, block_size=4), OFT),
    "oft_neumann": (peft.oft(BOTH, block_size=4, neumann_terms=5), OFT),
    "oft_shared": (peft.oft(BOTH, block_size=4, share=True), OFT),
    "boft": (peft.boft(BOTH, block_size=4), BOFT),
    "boft_butterfly": (peft.boft(BOTH, block_size=2, factors=2), BOFT),
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
    if case == "shira":
        frozen = {**frozen, name: places()}
    values = theirs(case, "value", table)
    assert {path: a.shape for path, a in values.items()} == {path: a.shape for path, a in tree.flatten(trainable[name]).items()}
    loss = lambda trained: jnp.sum(apply(method.attach(frozen, {name: trained}), x) * g)  # noqa: E731
    values = tree.unflatten(values)
    np.testing.assert_allclose(apply(method.attach(frozen, {name: values}), x), GOLDEN[f"{case}|y"], rtol=1e-5, atol=1e-5)
    got = tree.flatten(jax.grad(loss)(values))
    for path, gradient in theirs(case, "grad", table).items():
        np.testing.assert_allclose(got[path], gradient, rtol=1e-4, atol=1e-5, err_msg=path)


def places():
    """PEFT's indices [2, n] of (output, input)."""
    rows = {name: GOLDEN[f"shira|frozen|{name}"] for name in BOTH}
    return {name: {"kernel": {"places": jnp.asarray(inp * len(GOLDEN[name]) + out)}} for name, (out, inp) in rows.items()}


@pytest.mark.parametrize("case", ["vera", "randlora", "randlora_sparse"])
def test_random_projections_are_the_ones_that_peft_draws(case, key):
    frozen, _ = CASES[case][0].init(key, {name: {"kernel": jnp.asarray(GOLDEN[name].T)} for name in BOTH})
    a, b = frozen[case.split("_")[0]].values()
    want_a, want_b = (GOLDEN[f"{case}|frozen|{name}"] for name in "AB")
    np.testing.assert_array_equal(*((a.T, want_a) if case == "vera" else (a, want_a[:, 0])))
    np.testing.assert_array_equal(b.T if case == "vera" else b, want_b)
