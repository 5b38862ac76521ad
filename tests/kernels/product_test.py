import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.kernels.product import product

SHAPES = {"rows": (6, 5), "batch": (2, 3, 5), "one row": (1, 1, 5), "a vector": (5,)}
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}


def exact(x, w, dy, transposed):
    """The product and both gradients in float64."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    w = w.T if transposed else w
    rows, cotangents = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw = rows.T @ cotangents
    return x @ w, dy @ w.T, dw.T if transposed else dw


def close(found, expected, dtype):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=TOLERANCE[dtype] * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("transposed", [False, True], ids=["x w", "x wT"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product_and_gradients_equal_float64(key, shape, dtype, transposed):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], shape).astype(dtype)
    w = jax.random.normal(keys[1], (4, 5) if transposed else (5, 4)).astype(dtype)
    dy = jax.random.normal(keys[2], (*shape[:-1], 4)).astype(dtype)
    y, pull = jax.vjp(lambda x, w: product(x, w, transposed), x, w)
    found = (y, *pull(dy))
    for array, like in zip(found, (dy, x, w), strict=True):
        assert array.shape == like.shape and array.dtype == like.dtype
    for array, expected in zip(found, exact(x, w, dy, transposed), strict=True):
        close(array, expected, dtype)


def test_the_gradient_of_a_float32_matrix_is_not_rounded_to_the_dtype_of_x(key):
    x, w, dy = (jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key, 3), ((6, 5), (5, 4), (6, 4)), strict=True))
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    dw = jax.vjp(lambda w: product(x, w), w)[1](dy)[0]
    assert dw.dtype == jnp.float32
    close(dw, exact(x, w, dy, False)[2], "float32")


@pytest.mark.parametrize("trained", ["x", "w", "both"])
def test_the_backward_pass_keeps_only_what_a_gradient_needs(trained):
    x, w = jnp.ones((3, 5)), jnp.ones((5, 4))
    functions = {"x": (lambda x: product(x, w), x), "w": (lambda w: product(x, w), w), "both": (product, x, w)}
    kept = {leaf.shape for leaf in jax.tree.leaves(jax.vjp(*functions[trained])[1]) if leaf.size}
    assert kept == {"x": {w.shape}, "w": {x.shape}, "both": {x.shape, w.shape}}[trained]


def test_no_gradient_is_a_product_that_is_transposed_afterwards():
    """XLA:CPU folds such a transpose into a product of bfloat16 that has no fast code."""
    x, w = jnp.ones((2, 3, 5), jnp.bfloat16), jnp.ones((5, 4), jnp.bfloat16)
    for transposed, matrix in ((False, w), (True, w.T)):
        lowered = jax.jit(jax.grad(lambda x, w, t=transposed: product(x, w, t).sum().astype(jnp.float32), (0, 1))).lower(x, matrix)
        assert "dot_general" in lowered.as_text() and "stablehlo.transpose" not in lowered.as_text()


def test_a_gradient_that_is_transposed_by_its_reader_runs(key):
    """XLA:CPU compiled it into a product that it then could not run: UNIMPLEMENTED, DotThunk, BF16 x BF16 = F32."""
    x = jax.random.normal(key, (512, 576)).astype(jnp.bfloat16)
    w = jax.random.normal(key, (192, 576))
    found = jax.jit(jax.grad(lambda w: jnp.square(product(x, w.T).astype(jnp.float32)).sum()))(w)
    y = product(x, w.T.astype(jnp.bfloat16))
    close(found, 2 * np.asarray(y, np.float64).T @ np.asarray(x, np.float64), "bfloat16")
