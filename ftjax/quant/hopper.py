"""A quantised matrix for a Hopper GPU: the codes of `QuantizedWeight`, laid out once as the kernels there read them."""

from __future__ import annotations

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ftjax.kernels.int4_matmul import Packed, decode, hopper
from ftjax.quant.weight import SPECS, NestedScales, PackedWeight, QuantizedWeight
from ftjax.types import Params, pytree, static


@pytree
class HopperWeight(PackedWeight):
    """`by_rows()` is the `QuantizedWeight` that it was made of, bit for bit; it multiplies anywhere, and on a Hopper GPU fast."""

    codes: jax.Array
    """int32 `[..., o, i/8]`, see `ftjax.kernels.int4_matmul.decode.by_outputs`."""
    scales: jax.Array | NestedScales
    """As in `QuantizedWeight`, and so are the other fields."""
    zeros: jax.Array | None = None
    format: str = static(default="nf4")
    dtype_name: str = static(default="bfloat16")
    implementation: str = static(default="auto")

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, o, words = self.codes.shape
        return (*layers, 8 * words, o)

    def materialize(self) -> Float[Array, "*l i o"]:
        return self.by_rows().materialize()

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.by_rows().embed(ids)

    def by_rows(self) -> QuantizedWeight:
        """Return the matrix as it is on every other device."""
        codes = decode.by_rows(Packed(self.codes, self.codes)).codes
        return QuantizedWeight(codes, self.scales, self.zeros, self.format, self.dtype_name, self.implementation)


def for_hopper(params: Params) -> Params:
    """Return a tree whose 4-bit matrices are laid out for Hopper's kernels.

    Leaves of other formats and shapes, and those that ask for another implementation, stay as they are. Do it once, when the weights are
    where they run, and not to a table that rows are looked up in.

    Example:
      >>> import jax.numpy as jnp
      >>> from ftjax.quant import quantize
      >>> frozen = for_hopper({"kernel": quantize(jnp.ones((128, 64)), "int4"), "scale": jnp.ones(64)})
      >>> frozen["kernel"].codes.shape, frozen["kernel"].codes.dtype
      ((64, 16), dtype('int32'))
    """

    def one(leaf):
        if not isinstance(leaf, QuantizedWeight) or leaf.implementation not in ("auto", "gpu"):
            return leaf
        if hopper.unfit_matrix(SPECS[leaf.format], *leaf.shape[-2:], leaf.shape[-2] // leaf.group):
            return leaf
        codes = decode.by_outputs(Packed(leaf.codes, leaf.codes)).codes
        return HopperWeight(codes, leaf.scales, leaf.zeros, leaf.format, leaf.dtype_name, leaf.implementation)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))


def for_device(params: Params, mesh: Mesh) -> Params:
    """Return a tree laid out as the kernels of a mesh read it: for Hopper where that is its one device, otherwise as it is.

    On several devices matrices stay by rows, which their sharding is written for. Until the first tree is let go of, both are there.
    """
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "gpu" and hopper.unfit_device() is None
    return for_hopper(params) if alone else params
