"""A matrix product and its two gradients, each in the form that every compiler is fast at.

All three accumulate in float32 and are rounded once. To say so matters on a CPU, where XLA has bfloat16 units at work in products with a
float32 result and leaves others to code that takes five times as long (JAX 0.10: every product that is rounded at once), eleven times (a
single row) or fifty (JAX 0.12: the gradient of a matrix as JAX derives it, `(dyᵀ x)ᵀ`; `xᵀ dy` is the same matrix).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*b i"], w: Float[Array, "_ _"], transposed: bool = False) -> Float[Array, "*b o"]:
    """Return `x @ w` with w `[i, o]`, or `x @ wᵀ` with w `[o, i]`, in the dtype of x, which w is cast to.

    The gradient of w has the dtype of w, not rounded to that of x before. The backward pass keeps x only if w has a gradient, and w only
    if x has. There is no forward-mode derivative (`jax.jvp`).
    """
    if math.prod(x.shape[:-1]) == 1 and x.dtype.itemsize < 4:  # two equal rows are a matrix
        twice = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
        return product(twice, w, transposed)[0].reshape(*x.shape[:-1], -1)
    return _multiply(x, w.astype(x.dtype), (x.ndim - 1,), (1 if transposed else 0,), x.dtype)


def _multiply(x: jax.Array, y: jax.Array, over: tuple[int, ...], with_: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Return the sum of products over these axes of x with those axes of y, rounded to the dtype."""
    wide = jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype
    out = jax.lax.dot_general(x, y, ((over, with_), ((), ())), preferred_element_type=wide)
    if x.dtype != wide == dtype:
        # Not rounded, so a transpose would be folded in: a product of bfloat16 that XLA:CPU compiles and then cannot run.
        out = jax.lax.optimization_barrier(out)
    return out.astype(dtype)


def _forward(x, w, transposed: bool):
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None, jnp.empty((0,), w.value.dtype)
    return product(x.value, w.value, transposed), kept


def _backward(transposed: bool, kept, dy):
    x, w, like = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dx = None if w is None else product(dy, w, not transposed)
    if x is None:
        return dx, None
    # With an axis before the rows: of plain matrices XLA:CPU multiplies the transpose of one, five times as slowly.
    first, second = (dy[None], x[None]) if transposed else (x[None], dy[None])
    rows = tuple(range(dy.ndim))
    return dx, _multiply(first, second, rows, rows, like.dtype)


product.defvjp(_forward, _backward, symbolic_zeros=True)
