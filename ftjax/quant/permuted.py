"""A quantised matrix whose groups are of rows that do not lie side by side: they are sorted, and the input is sorted with them.

GPTQ's "act order" (Frantar et al. 2022, arXiv:2210.17323) quantises the rows with the largest inputs first, and groups them in that order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
        return self.base.dot(jnp.take(x, self.order, axis=-1, unique_indices=True))

    def dot_transposed(self, x: Float[Array, "*b o"]) -> Float[Array, "*b i"]:
        return jnp.take(self.base.dot_transposed(x), jnp.argsort(self.order), axis=-1, unique_indices=True)

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.base.embed(jnp.argsort(self.order)[ids])
