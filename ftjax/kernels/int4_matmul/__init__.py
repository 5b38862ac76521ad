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
from ftjax.kernels.int4_matmul.implementations import IMPLEMENTATIONS, Choice, Implementation, check, choice
from ftjax.kernels.int4_matmul.place import Place, gathered, part, run


def product(
    x: Float[Array, "*b i"], w: Packed, spec: Spec, *, implementation: str = "auto", place: Place | None = None
) -> Float[Array, "*b o"]:
    """Return `x D(w)` in the dtype of x; gradients flow into x alone.

    Args:
      x: rows, in float32 or bfloat16.
      w: one matrix.
      spec: how its codes are read.
      implementation: of `IMPLEMENTATIONS`, or "auto": the first that fits on the platform that the program is lowered for.
      place: where both lie, on a mesh.

    Raises:
      ValueError: the implementation cannot take the product; the message says why.
    """
    return _product(spec, check(implementation), place, x, w)


def product_transposed(
    x: Float[Array, "*b o"], w: Packed, spec: Spec, *, implementation: str = "auto", place: Place | None = None
) -> Float[Array, "*b i"]:
    """Return `x D(w)ᵀ` in the dtype of x; gradients flow into x alone. See `product`."""
    return _product_transposed(spec, check(implementation), place, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(spec: Spec, name: str, place: Place | None, x: jax.Array, w: Packed) -> jax.Array:
    return run("product", spec, name, place, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product_transposed(spec: Spec, name: str, place: Place | None, x: jax.Array, w: Packed) -> jax.Array:
    return run("product_transposed", spec, name, place, x, w)


def _forward(product: Callable[..., jax.Array], spec: Spec, name: str, place: Place | None, x: jax.Array, w: Packed):
    return product(spec, name, place, x, w), w


def _backward(other: Callable[..., jax.Array], spec: Spec, name: str, place: Place | None, w: Packed, cotangent: jax.Array):
    return other(spec, name, place, cotangent, w), None


_product.defvjp(functools.partial(_forward, _product), functools.partial(_backward, _product_transposed))
_product_transposed.defvjp(functools.partial(_forward, _product_transposed), functools.partial(_backward, _product))

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Implementation",
    "Packed",
    "Place",
    "Spec",
    "choice",
    "dense",
    "check",
    "gathered",
    "pack",
    "part",
    "product",
    "product_transposed",
    "unpack",
    "values",
]
