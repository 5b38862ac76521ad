"""A quantised matrix whose groups are of rows that do not lie side by side: they are sorted, and the input is sorted with them.

GPTQ's "act order" (Frantar et al. 2022, arXiv:2210.17323) quantises the rows with the largest inputs first, and groups them in that order.

On a mesh that splits its rows a device has some of the sorted ones, which may be any rows of the matrix. So their inputs come from every
device: x, which such a mesh splits as well, is gathered before it is sorted, and so is the gradient of x before it is put back.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ftjax.kernels import int4_matmul
from ftjax.kernels.int4_matmul import Place
from ftjax.quant.weight import QuantizedWeight
from ftjax.types import pytree
from ftjax.weights import Weight


@pytree
class PermutedWeight(Weight):
    """`W[order[k]] = base[k]`, so that `x W = x[order] base`."""

    base: QuantizedWeight
    order: jax.Array
    """int32 `[..., i]`: which row of the matrix each row of `base` is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def materialize(self) -> Float[Array, "*l i o"]:
        return jnp.take_along_axis(self.base.materialize(), jnp.argsort(self.order)[..., None], axis=-2)

    def dot(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return self.base.dot(_taken(self.base.place, x, self.order))

    def dot_transposed(self, x: Float[Array, "*b o"]) -> Float[Array, "*b i"]:
        return _taken(self.base.place, self.base.dot_transposed(x), jnp.argsort(self.order))

    def on_mesh(self, mesh: Mesh, rows: tuple[str, ...], dense: tuple[Any, ...]) -> PermutedWeight:
        return dataclasses.replace(self, base=self.base.on_mesh(mesh, rows, dense))

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.base.embed(jnp.argsort(self.order)[ids])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(place: Place | None, x: Float[Array, "*b i"], order: jax.Array) -> Float[Array, "*b i"]:
    """Return `x[..., order]`; its gradient is taken in the inverse order, where JAX would scatter and a mesh add up whole copies of it."""
    return jnp.take(int4_matmul.gathered(place, x), order, axis=-1, unique_indices=True)


_taken.defvjp(
    lambda place, x, order: (_taken(place, x, order), order),
    lambda place, order, gradient: (_taken(place, gradient, jnp.argsort(order)), None),
)
