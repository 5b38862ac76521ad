"""Products with a matrix that stays packed, and their gradients from the same bytes.

`product(x, w)` is `x D(w)` and `product_transposed(x, w)` is `x D(w)ᵀ`; each is the gradient of the other, and all that the backward pass
keeps is the packed matrix. There is no gradient in the matrix. `decode` says what the bytes mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from ftjax import tree
from ftjax.kernels.int4_matmul import reference
from ftjax.kernels.int4_matmul.decode import Packed, Spec, dense, pack, unpack, values


class Implementation(NamedTuple):
    """The two products over rows `[m, i]` and `[m, o]`."""

    product: Callable[[Spec, jax.Array, Packed], jax.Array]
    product_transposed: Callable[[Spec, jax.Array, Packed], jax.Array]


IMPLEMENTATIONS: Mapping[str, Implementation] = {"reference": Implementation(reference.product, reference.product_transposed)}


def chosen(implementation: str = "auto") -> str:
    """Return the name of the implementation that runs; `"auto"` is the plain one as long as there is no other.

    Raises:
      ValueError: there is none of this name.
    """
    name = "reference" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"int4_matmul: there is no implementation {name!r}; nearest: {tree.nearest(name, IMPLEMENTATIONS)}.")
    return name


def product(x: Float[Array, "*b i"], w: Packed, spec: Spec, *, implementation: str = "auto") -> Float[Array, "*b o"]:
    """Return `x D(w)` in the dtype of x; gradients flow into x alone."""
    rows = _product(spec, chosen(implementation), x.reshape(-1, x.shape[-1]), w)
    return rows.reshape(*x.shape[:-1], -1)


def product_transposed(x: Float[Array, "*b o"], w: Packed, spec: Spec, *, implementation: str = "auto") -> Float[Array, "*b i"]:
    """Return `x D(w)ᵀ` in the dtype of x; gradients flow into x alone."""
    rows = _product_transposed(spec, chosen(implementation), x.reshape(-1, x.shape[-1]), w)
    return rows.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: Spec, name: str, x: jax.Array, w: Packed) -> jax.Array:
    return IMPLEMENTATIONS[name].product(spec, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_transposed(spec: Spec, name: str, x: jax.Array, w: Packed) -> jax.Array:
    return IMPLEMENTATIONS[name].product_transposed(spec, x, w)


def _forward(product: Callable[..., jax.Array], spec: Spec, name: str, x: jax.Array, w: Packed) -> tuple[jax.Array, Packed]:
    return product(spec, name, x, w), w


def _backward(other: Callable[..., jax.Array], spec: Spec, name: str, w: Packed, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return other(spec, name, cotangent, w), None


_product.defvjp(functools.partial(_forward, _product), functools.partial(_backward, _product_transposed))
_product_transposed.defvjp(functools.partial(_forward, _product_transposed), functools.partial(_backward, _product))

__all__ = ["IMPLEMENTATIONS", "Packed", "Spec", "chosen", "dense", "pack", "product", "product_transposed", "unpack", "values"]
