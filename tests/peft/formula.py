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
    given = {name: a for name, a in arrays.items() if isinstance(a, jax.Array)}
    settings = {name: a for name, a in arrays.items() if name not in given}
    trained = {name: a for name, a in given.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    uses = {
        "dot": lambda w: jnp.sum(y * weights.dot(x, w)),
        "dot_transposed": lambda w: jnp.sum(x * weights.dot_transposed(y, w)),
        "materialize": lambda w: jnp.sum(y * (x @ weights.materialize(w))),
    }

    @jax.jit  # one program for all of it: compiling is what a test waits for
    def results(base, given, trained):
        w = leaf(base, **settings, **given)
        stacked = leaf(jnp.stack([base, base]), **settings, **{name: jnp.stack([a, a]) for name, a in given.items()})
        products = (weights.materialize(w), weights.dot(x, w), weights.dot_transposed(y, w), weights.embed(ids, w))
        of_trained = lambda use: jax.grad(lambda trained: use(leaf(base, **settings, **{**given, **trained})))(trained)  # noqa: E731
        return products, weights.materialize(stacked), {name: of_trained(use) for name, use in uses.items()}

    products, stacked, gradients = results(base, given, trained)
    want = dense(double(base), **double(arrays))
    for got, wanted in zip(products, (want, double(x) @ want, double(y) @ want.T, want[np.asarray(ids)]), strict=True):
        close(got, wanted)
    close(stacked, np.stack([want, want]))

    way = {name: normal(jax.random.fold_in(keys[3], n), *a.shape) for n, (name, a) in enumerate(trained.items())}

    def formula(step):
        moved = {name: double(a) + step * double(way[name]) for name, a in trained.items()}
        return np.sum(double(y) * (double(x) @ dense(double(base), **{**double(arrays), **moved})))

    slope = (formula(1e-5) - formula(-1e-5)) / 2e-5
    for name, gradient in gradients.items():
        got = sum(np.vdot(double(gradient[field]), double(way[field])) for field in trained)
        np.testing.assert_allclose(got, slope, rtol=grad_rtol, atol=1e-2, err_msg=name)


def double(values):
    if isinstance(values, dict):
        return {name: double(a) for name, a in values.items()}
    if isinstance(values, jax.Array):
        return np.asarray(values, np.float64 if jnp.issubdtype(values.dtype, jnp.floating) else None)
    return values


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-4)
