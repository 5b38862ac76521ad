"""Products with a matrix that stays packed, and their gradients from the same bytes.

`product(x, w)` is `x D(w)` and `product_transposed(x, w)` is `x D(w)ᵀ`; each is the gradient of the other, and all that the backward pass
keeps is the packed matrix. There is no gradient in the matrix. `decode` says what the bytes mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from ftjax.kernels.int4_matmul.decode import Packed, Spec, dense, pack, unpack, values
from ftjax.kernels.int4_matmul.implementations import IMPLEMENTATIONS, Choice, Implementation, check, choice, run


def product(x: Float[Array, "*b i"], w: Packed, spec: Spec, *, implementation: str = "auto") -> Float[Array, "*b o"]:
    """Return `x D(w)` in the dtype of x; gradients flow into x alone."""
    rows = _product(spec, check(implementation), x.reshape(-1, x.shape[-1]), w)
    return rows.reshape(*x.shape[:-1], -1)


def product_transposed(x: Float[Array, "*b o"], w: Packed, spec: Spec, *, implementation: str = "auto") -> Float[Array, "*b i"]:
    """Return `x D(w)ᵀ` in the dtype of x; gradients flow into x alone."""
    rows = _product_transposed(spec, check(implementation), x.reshape(-1, x.shape[-1]), w)
    return rows.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: Spec, name: str, x: jax.Array, w: Packed) -> jax.Array:
    return run("product", spec, name, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_transposed(spec: Spec, name: str, x: jax.Array, w: Packed) -> jax.Array:
    return run("product_transposed", spec, name, x, w)


def _forward(product: Callable[..., jax.Array], spec: Spec, name: str, x: jax.Array, w: Packed) -> tuple[jax.Array, Packed]:
    return product(spec, name, x, w), w


def _backward(other: Callable[..., jax.Array], spec: Spec, name: str, w: Packed, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return other(spec, name, cotangent, w), None


_product.defvjp(functools.partial(_forward, _product), functools.partial(_backward, _product_transposed))
_product_transposed.defvjp(functools.partial(_forward, _product_transposed), functools.partial(_backward, _product))

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Implementation",
    "Packed",
    "Spec",
    "choice",
    "dense",
    "pack",
    "product",
    "product_transposed",
    "unpack",
    "values",
]
