"""A quantised matrix for a Hopper GPU: the codes of `QuantizedWeight`, laid out once as the kernels there read them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.kernels import int4_matmul
from ftjax.kernels.int4_matmul import Packed, decode, hopper
from ftjax.quant.weight import SPECS, NestedScales, QuantizedWeight, packed
from ftjax.types import Params, pytree, static
from ftjax.weights import Weight


@pytree
class HopperWeight(Weight):
    """`by_rows()` is the `QuantizedWeight` that it was made of, bit for bit; it multiplies anywhere, and on a Hopper GPU fast."""

    codes: jax.Array
    """int32 `[..., o, i/8]`, see `ftjax.kernels.int4_matmul.decode.by_outputs`."""
    scales: jax.Array | NestedScales
    """As in `QuantizedWeight`, and so are the other fields."""
    zeros: jax.Array | None = None
    format: str = static(default="nf4")
    dtype_name: str = static(default="bfloat16")

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, o, words = self.codes.shape
        return (*layers, 8 * words, o)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype_name)

    def materialize(self) -> Float[Array, "*l i o"]:
        return self.by_rows().materialize()

    def dot(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return int4_matmul.product(x, self._packed(), SPECS[self.format])

    def dot_transposed(self, x: Float[Array, "*b o"]) -> Float[Array, "*b i"]:
        return int4_matmul.product_transposed(x, self._packed(), SPECS[self.format])

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.by_rows().embed(ids)

    def by_rows(self) -> QuantizedWeight:
        """Return the matrix as it is on every other device."""
        codes = decode.by_rows(Packed(self.codes, self.codes)).codes
        return QuantizedWeight(codes, self.scales, self.zeros, self.format, self.dtype_name)

    def _packed(self) -> Packed:
        return packed(self.codes, self.scales, self.zeros)


def for_hopper(params: Params) -> Params:
    """Return a tree whose 4-bit matrices are laid out for Hopper's kernels; leaves of other formats and shapes stay as they are.

    Do it once, when the weights are where they run and before adapters ride on them, and not to a table that rows are looked up in.

    Example:
      >>> from ftjax.quant import quantize
      >>> frozen = for_hopper({"kernel": quantize(jnp.ones((128, 64)), "int4"), "scale": jnp.ones(64)})
      >>> frozen["kernel"].codes.shape, frozen["kernel"].codes.dtype
      ((64, 16), dtype('int32'))
    """

    def one(leaf):
        if not isinstance(leaf, QuantizedWeight) or hopper.unfit_matrix(SPECS[leaf.format], *leaf.shape[-2:], _groups(leaf)):
            return leaf
        codes = decode.by_outputs(Packed(leaf.codes, leaf.codes)).codes
        return HopperWeight(codes, leaf.scales, leaf.zeros, leaf.format, leaf.dtype_name)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))


def _groups(w: QuantizedWeight) -> int:
    return w.scales.codes.shape[-1] if isinstance(w.scales, NestedScales) else w.scales.shape[-2]
