"""A quantised matrix as a leaf that knows how to multiply: packed codes, a scale for each group of rows, and how to read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ftjax.kernels import int4_matmul
from ftjax.kernels.int4_matmul import Choice, Packed, Place, Spec
from ftjax.quant import codes
from ftjax.types import pytree, static
from ftjax.weights import Weight

SPECS: Mapping[str, Spec] = {
    "nf4": Spec(4, tuple(codes.NF4.tolist())),
    "fp4": Spec(4, tuple(codes.FP4.tolist())),
    "int4": Spec(4, (*map(float, range(8)), *map(float, range(-8, 0)))),  # two's complement
    "uint4": Spec(4, tuple(map(float, range(16)))),
    "int8": Spec(8, None, 1 / 127),
    "uint8": Spec(8, None),  # codes and zeros less 128
}
"""How the codes of each format are read. The scale is the group's largest magnitude, of int4, uint4 and uint8 the size of a step."""

NESTED_BLOCK = 256
"""Scales that share a scale, where they are quantised themselves."""


@pytree
class NestedScales:
    """Scales quantised in turn: `dynamic[code] · scale + mean`, 256 a block, output by output (Dettmers et al. 2023, arXiv:2305.14314)."""

    codes: jax.Array
    """uint8 `[..., o, n]`: of n groups of rows."""
    scales: jax.Array
    """float32 `[..., ceil(o n / 256)]`."""
    mean: jax.Array
    """float32 `[...]`."""

    def expand(self) -> Float[Array, "*l n o"]:
        """Return the scales, float32."""
        *layers, o, n = self.codes.shape
        numbers = jnp.asarray(codes.dynamic())[self.codes.astype(jnp.int32)]  # as it lies on a mesh, so it is not made flat
        scales = jnp.repeat(self.scales, NESTED_BLOCK, axis=-1)[..., : o * n].reshape(*layers, o, n)
        return jnp.swapaxes(numbers * scales + self.mean[..., None, None], -1, -2)


def magnitudes(scales: Any) -> tuple[Any, ...]:
    """Return the floating-point arrays that scales are made of: one that is not finite is of numbers that were not."""
    return (scales.mean, scales.scales) if isinstance(scales, NestedScales) else (scales,)


class PackedWeight(Weight):
    """A matrix `[..., i, o]` that is multiplied as it is packed, in one layout of its codes or another."""

    codes: jax.Array
    scales: jax.Array | NestedScales
    zeros: jax.Array | None
    format: str
    """Of `SPECS`."""
    dtype_name: str
    """Of what was quantised, and of `materialize`."""
    implementation: str
    """Of the products: see `ftjax.kernels.int4_matmul.IMPLEMENTATIONS`."""
    place: Place | None = None
    """Where it lies, on a mesh."""

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype_name)

    def dot(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return int4_matmul.product(x, self._packed(), self._spec, implementation=self.implementation, place=self.place)

    def dot_transposed(self, x: Float[Array, "*b o"]) -> Float[Array, "*b i"]:
        return int4_matmul.product_transposed(x, self._packed(), self._spec, implementation=self.implementation, place=self.place)

    def choice(self, rows: int, dtype: jnp.dtype, platform: str) -> Choice:
        """Return which implementation multiplies so many rows of a dtype on each device of a platform, and why not the others.

        Raises:
          ValueError: one is asked for that cannot.
        """
        packed = jax.eval_shape(lambda w: jax.tree.map(lambda array: array.reshape(-1, *array.shape[-2:])[0], w._packed()), self)
        packed = packed if self.place is None else int4_matmul.part(self.place, self._spec, packed)
        return int4_matmul.choice(self._spec, rows, packed, dtype, platform=platform, implementation=self.implementation)

    @property
    def _spec(self) -> Spec:
        return SPECS[self.format]

    @property
    def group(self) -> int:
        """The rows that share a scale."""
        groups = self.scales.codes.shape[-1] if self.nested else self.scales.shape[-2]
        return self.shape[-2] // groups

    @property
    def nested(self) -> bool:
        """Whether its scales are quantised too."""
        return isinstance(self.scales, NestedScales)

    def _packed(self) -> Packed:
        """Return the arrays as a product reads them, nested scales expanded."""
        return Packed(self.codes, self.scales.expand() if self.nested else self.scales, self.zeros)


@pytree
class QuantizedWeight(PackedWeight):
    """A matrix `[..., i, o]` of which only codes and scales exist; `ftjax.kernels.int4_matmul.decode` says what they stand for."""

    codes: jax.Array
    """uint8 `[..., i/2, o]`, two 4-bit codes a byte, or int8 `[..., i, o]`."""
    scales: jax.Array | NestedScales
    """float32 `[..., n, o]`: of n groups of i/n rows."""
    zeros: jax.Array | None = None
    """float32 `[..., n, o]`: the number that stands for zero, of `uint4` and `uint8`."""
    format: str = static(default="nf4")
    dtype_name: str = static(default="bfloat16")
    implementation: str = static(default="auto")
    place: Place | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, rows, o = self.codes.shape
        return (*layers, rows * 8 // self._spec.bits, o)

    def materialize(self) -> Float[Array, "*l i o"]:
        return int4_matmul.dense(self._spec, self._packed(), self.dtype)

    def on_mesh(self, mesh: Mesh, rows: tuple[str, ...], dense: tuple[Any, ...]) -> QuantizedWeight:
        return dataclasses.replace(self, place=Place(mesh, rows, *dense[-2:]))

    def embed(self, ids: jax.Array) -> jax.Array:
        packed, spec, (i, _) = self._packed(), self._spec, self.shape
        at = ids // (i // packed.scales.shape[-2])
        halves = (4 * (ids % 2)).astype(jnp.uint8)[..., None]
        row = packed.codes[ids] if spec.bits == 8 else (packed.codes[ids // 2] >> halves) & 15
        zeros = None if packed.zeros is None else packed.zeros[at]
        return int4_matmul.values(spec, row, packed.scales[at], zeros, self.dtype)
