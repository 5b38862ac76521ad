"""A weight is a leaf that knows how to multiply.

Models call the functions of this file and never `@`, so a leaf may be a plain array, a low-rank sum, a quantised matrix or anything
else that implements `Weight`. A new method is a subclass in a file of its own; no model has to hear of it.

A weight stands for an array `[..., i, o]` with the contraction over `i`; leading axes are stacked layers, which a scan removes before
any of these functions sees the leaf.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ftjax.kernels.product import product

PRODUCT = "product"
"""The `checkpoint_name` of what took a dense product or an attention to compute; the rest of a layer is elementwise and cheap."""
LOW_RANK = "low_rank"
"""The `checkpoint_name` of thin intermediate products, which cost as much to compute as dense ones and little to store."""


class Weight(abc.ABC):
    """What stands for a dense array `[..., i, o]`. Subclasses are final frozen pytree dataclasses (`ftjax.types.pytree`)."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array that this stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype that `materialize` returns."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "*l i o"]:
        """Return the dense array."""

    def dot(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Return `x @ W`, `[..., i] -> [..., o]`, in the dtype of `x`."""
        return dot(x, self.materialize())

    def dot_transposed(self, x: Float[Array, "*b o"]) -> Float[Array, "*b i"]:
        """Return `x @ Wᵀ`, `[..., o] -> [..., i]`, in the dtype of `x`: a tied output head."""
        return dot_transposed(x, self.materialize())

    def embed(self, ids: Int[Array, "*b"]) -> Float[Array, "*b o"]:
        """Return the rows `W[ids]`, `[...] -> [..., o]`."""
        return embed(ids, self.materialize())

    def dots(self, x: Float[Array, "*b i"], ws: Sequence[Any]) -> tuple[Float[Array, "*b _"], ...]:
        """Return `[x @ w for w in ws]`, this weight among them; a subclass may share work between them."""
        return tuple(dot(x, w) for w in ws)

    def on_mesh(self, mesh: Mesh, rows: tuple[str, ...], dense: tuple[Any, ...]) -> Weight:
        """Return this weight, told where it lies: for one whose product the compiler cannot split by itself. By default as it is.

        `rows` are the axes of the mesh that the rows of x are split over, `dense` has an entry for each axis of the dense array.
        """
        del mesh, rows, dense
        return self

    def __matmul__(self, other):
        raise TypeError(
            f"{type(self).__name__} is a Weight, not an array: write ftjax.weights.dot(x, w), or materialize(w) for the dense array."
        )

    __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = __matmul__


class Wrapper(Weight):
    """A weight that rides on another leaf, its field `base`, and stands for an array of the same shape and dtype. Abstract."""

    base: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def on_mesh(self, mesh: Mesh, rows: tuple[str, ...], dense: tuple[Any, ...]) -> Wrapper:
        return dataclasses.replace(self, base=self.base.on_mesh(mesh, rows, dense)) if isinstance(self.base, Weight) else self

    def neutral(self) -> Wrapper:
        """Return a weight of this kind and these shapes that stands for its base: by default the one whose own numbers are 0."""
        own = dataclasses.replace(self, base=None)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, own)
        return dataclasses.replace(zeros, base=self.base)


Leaf = jax.Array | Weight


def dot(x: Float[Array, "*b i"], w: Leaf) -> Float[Array, "*b o"]:
    """Return `x @ w`, `[..., i] -> [..., o]`, in the dtype of `x`."""
    if isinstance(w, Weight):
        return w.dot(x)
    return product(x, w)


def dot_transposed(x: Float[Array, "*b o"], w: Leaf) -> Float[Array, "*b i"]:
    """Return `x @ wᵀ`, `[..., o] -> [..., i]`, in the dtype of `x`."""
    if isinstance(w, Weight):
        return w.dot_transposed(x)
    return product(x, w, True)


def dots(x: Float[Array, "*b i"], ws: Sequence[Leaf]) -> tuple[Float[Array, "*b _"], ...]:
    """Return `[x @ w for w in ws]`: several weights over one input, as in q, k, v or gate and up."""
    leader = next((w for w in ws if isinstance(w, Weight)), None)
    return tuple(dot(x, w) for w in ws) if leader is None else leader.dots(x, ws)


def embed(ids: Int[Array, "*b"], w: Leaf) -> Float[Array, "*b o"]:
    """Return the rows `w[ids]`, `[...] -> [..., o]`."""
    if isinstance(w, Weight):
        return w.embed(ids)
    return jnp.take(w, ids, axis=0)


def materialize(w: Leaf) -> Array:
    """Return the dense array that `w` stands for."""
    return w.materialize() if isinstance(w, Weight) else w


def dense(params: Any) -> Any:
    """Return the tree with every `Weight` materialised: what merging an adapter means."""
    return jax.tree.map(materialize, params, is_leaf=lambda leaf: isinstance(leaf, Weight))
