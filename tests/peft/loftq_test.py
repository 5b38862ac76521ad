"""What is quantised and what rides on it are made together: their sum is nearer the dense matrix than the base alone."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, quant, tree, weights
from ftjax.quant import codes

PATH = "layers/q_proj/kernel"
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "peft_loftq.npz")  # third_party/peft/loftq_golden.py
RANK, GROUP = 3, 16


def start(w, **options):
    """Return the base and the `LoraWeight` on it."""
    method = peft.loftq([PATH.split("/")[1]], **options)
    frozen, trainable = method.init(jax.random.key(0), tree.unflatten({PATH: w}))
    return tree.flatten(frozen)[PATH], tree.flatten(method.attach(frozen, trainable))[PATH]


def matrices(key):
    """A stack of two, normal with something of low rank in it."""
    noise, a, b = jax.random.split(key, 3)
    return jax.random.normal(noise, (2, 64, 24)) + jax.random.normal(a, (2, 64, 2)) @ jax.random.normal(b, (2, 2, 24))


def nf4(w):
    """Return what NF4 makes of `[i, o]` in float64."""
    grouped = w.reshape(-1, GROUP, w.shape[-1])
    largest = np.abs(grouped).max(axis=1, keepdims=True)
    book = codes.NF4.astype(np.float64)
    return (book[np.abs((grouped / largest)[..., None] - book).argmin(axis=-1)] * largest).reshape(w.shape)


@pytest.fixture(scope="module")
def made():
    """A stack, and base and weight made of it in one and in three iterations."""
    w = matrices(jax.random.key(0))
    return w, {n: start(w, rank=RANK, alpha=6, group=GROUP, nested=False, iterations=n) for n in (1, 3)}


def test_base_and_term_are_those_of_the_algorithm_in_float64(made):
    w, (base, joined) = made[0], made[1][3]
    for layer, matrix in enumerate(np.asarray(w, np.float64)):
        term = 0
        for _ in range(3):
            packed = nf4(matrix - term)
            u, s, vt = np.linalg.svd(matrix - packed, full_matrices=False)
            term = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        np.testing.assert_allclose(base.materialize()[layer], packed, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(joined.delta()[layer], term, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(joined.scale, [2, 2])


def test_the_start_is_nearer_the_dense_matrix_than_the_base_and_nearer_after_more_iterations(made):
    w, start = made

    def error(leaf):
        return float(jnp.linalg.norm(weights.materialize(leaf) - w))

    assert error(start[1][0]) > 1.1 * error(start[1][1]) > 1.1 * error(start[3][1])


def test_at_scale_one_they_are_those_of_peft():
    base, joined = start(jnp.asarray(GOLDEN["weight"].T), rank=4, nested=False, iterations=3)
    np.testing.assert_allclose(base.materialize().T, GOLDEN["base"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(joined.delta().T, GOLDEN["b"] @ GOLDEN["a"], rtol=1e-4, atol=1e-6)


def test_a_randomised_svd_finds_nearly_the_same_term(made):
    w, exact = made[0], made[1][1][1].delta()
    found = start(w, rank=RANK, alpha=6, group=GROUP, nested=False, svd_iterations=8)[1].delta()
    np.testing.assert_allclose(found, exact, atol=0.02 * float(jnp.abs(exact).max()))


def test_after_one_iteration_the_base_needs_only_the_plan(key):
    params = tree.unflatten({PATH: matrices(key).astype(jnp.bfloat16)})
    method = peft.loftq(rank=2)
    made, again = method.init(key, params)[0], peft.FORMATS["loftq"].base(params, method.plan(params))
    assert jax.tree.structure(made) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    kept = peft.FORMATS["loftq"].base(made, method.plan(params))
    assert kept["layers"]["q_proj"]["kernel"].codes is made["layers"]["q_proj"]["kernel"].codes
    with pytest.raises(ValueError, match="loftq: 'layers/q_proj/kernel' is packed already, int8 .* not nf4"):
        peft.FORMATS["loftq"].base(quant.int8(["q_proj"]).init(key, params)[0], method.plan(params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "at least 1, not 0"),
        ({"format": "nf5"}, "no format 'nf5'; nearest: 'nf4'"),
        ({"group": 48}, "q_proj.*64 rows.*groups of 48.*exclude it"),
        ({"rank": 25}, "rank 25 does not fit"),
    ],
)
def test_what_cannot_start_is_said(options, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(start, **options), matrices(key))


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_number_that_is_not_finite_is_refused(iterations, key):
    with pytest.raises(ValueError, match=rf"loftq: '{PATH}' holds numbers that are not finite, in layers \[1\]"):
        start(matrices(key).at[1, 5, 3].set(jnp.nan), rank=RANK, iterations=iterations)
