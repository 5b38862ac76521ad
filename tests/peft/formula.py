"""A leaf against its formula in NumPy float64: the value of every product, and its gradient by central differences of the formula."""

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import weights


def normal(key, *shape):
    return jax.random.normal(key, shape)


def check(leaf, dense, arrays, *, i, o, key, grad_rtol=2e-4):
    """Check `leaf(base, **arrays)` against `dense(base, **arrays)`, for one matrix and for a stack of two.

    Args:
      leaf: makes the Weight.
      dense: the formula, of float64 arrays.
      arrays: float32, for one matrix; what is not an array is passed on as it is.
      i: rows of the matrix.
      o: its columns.
      key: for the base and the inputs.
      grad_rtol: allowed error of the gradient.
    """
    keys = jax.random.split(key, 4)
    base, x, y = normal(keys[0], i, o), normal(keys[1], 2, 3, i), normal(keys[2], 2, 3, o)
    ids = jnp.array([[0, i - 1], [i // 2, 0]])
    want = dense(double(base), **double(arrays))
    w = leaf(base, **arrays)
    close(weights.materialize(w), want)
    close(weights.dot(x, w), double(x) @ want)
    close(weights.dot_transposed(y, w), double(y) @ want.T)
    close(weights.embed(ids, w), want[np.asarray(ids)])

    stacked = leaf(jnp.stack([base, base]), **{name: jnp.stack([a, a]) if isinstance(a, jax.Array) else a for name, a in arrays.items()})
    close(weights.materialize(stacked), np.stack([want, want]))

    trained = {name: a for name, a in arrays.items() if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)}
    way = {name: normal(jax.random.fold_in(keys[3], n), *a.shape) for n, (name, a) in enumerate(trained.items())}

    def formula(step):
        moved = {name: double(a) + step * double(way[name]) for name, a in trained.items()}
        return np.sum(double(y) * (double(x) @ dense(double(base), **{**double(arrays), **moved})))

    slope = (formula(1e-5) - formula(-1e-5)) / 2e-5
    uses = {
        "dot": lambda w: jnp.sum(y * weights.dot(x, w)),
        "dot_transposed": lambda w: jnp.sum(x * weights.dot_transposed(y, w)),
        "materialize": lambda w: jnp.sum(y * (x @ weights.materialize(w))),
    }
    for name, use in uses.items():
        gradient = jax.grad(lambda trained, use=use: use(leaf(base, **{**arrays, **trained})))(trained)
        got = sum(float(jnp.vdot(gradient[field], way[field])) for field in trained)
        np.testing.assert_allclose(got, slope, rtol=grad_rtol, atol=1e-2, err_msg=name)


def double(values):
    if isinstance(values, dict):
        return {name: double(a) for name, a in values.items()}
    if isinstance(values, jax.Array):
        return np.asarray(values, np.float64 if jnp.issubdtype(values.dtype, jnp.floating) else None)
    return values


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-4)
