"""The bytes of a quantised matrix and the numbers that they stand for: the one definition that every implementation must equal.

    D[r, c] = round( (number(code[r, c]) - zero[r // g, c]) · scale[r // g, c] · unit )

with g rows a group, all in float32 and rounded once, to the dtype that is multiplied in. Two 4-bit codes share a byte: byte (j, c) holds
code (2j, c) in its low half and code (2j + 1, c) in its high one. 8-bit codes are signed bytes. `by_outputs` lays 4-bit codes out as
Hopper's kernels read them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Spec(NamedTuple):
    """What is known of a matrix before tracing."""

    bits: int
    """Of a code: 4 or 8."""
    book: tuple[float, ...] | None
    """The number of each code; None: the code itself."""
    unit: float = 1.0


class Packed(NamedTuple):
    """The arrays of a matrix `[i, o]`, or of a stack of them."""

    codes: jax.Array
    """uint8 `[..., i/2, o]`, or int8 `[..., i, o]`, or int4 `[..., o, i]` (see `by_outputs`)."""
    scales: jax.Array
    """float32 `[..., n, o]`: of n groups of i/n rows."""
    zeros: jax.Array | None = None
    """float32 `[..., n, o]`: the number that stands for zero, where that is not 0."""


def pack(codes: Int[Array, "*l i o"]) -> Int[Array, "*l j o"]:
    """Return 4-bit codes two a byte, `[..., i, o] -> uint8 [..., i/2, o]`."""
    return codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)


def unpack(packed: Int[Array, "*l j o"]) -> Int[Array, "*l i o"]:
    """Return the codes of `pack`, `[..., i/2, o] -> uint8 [..., i, o]`."""
    *layers, j, o = packed.shape
    return jnp.stack([packed & 15, packed >> 4], axis=-2).reshape(*layers, 2 * j, o)


def by_outputs(w: Packed) -> Packed:
    """Return 4-bit codes as int4 `[..., o, i]`: column c of the matrix is a row, the row 8q + 2j + b of each 32 stands at 8j + 2q + b.

    So the 8 codes that a thread reads as one word are those whose numbers it holds for the tensor cores.

    Raises:
      ValueError: the codes are not two a byte, or their rows are not a multiple of 32.
    """
    if w.codes.dtype != jnp.uint8 or w.codes.shape[-2] % 16:
        raise ValueError(f"int4_matmul: codes two a byte, uint8 [..., 16 n, o], are expected, not {w.codes.dtype}{list(w.codes.shape)}.")
    codes = jnp.swapaxes(unpack(w.codes), -1, -2)
    return w._replace(codes=((_turned(codes) ^ 8).astype(jnp.int8) - jnp.int8(8)).astype(jnp.int4))


def by_rows(w: Packed) -> Packed:
    """Return codes as they were before `by_outputs`, if they were laid out by it."""
    if w.codes.dtype != jnp.int4:
        return w
    codes = (w.codes.astype(jnp.int8) & 15).astype(jnp.uint8)
    return w._replace(codes=pack(jnp.swapaxes(_turned(codes), -1, -2)))


def shape(spec: Spec, w: Packed) -> tuple[int, int]:
    """Return rows and columns of the matrix."""
    *_, rows, columns = w.codes.shape
    return (columns, rows) if w.codes.dtype == jnp.int4 else (rows * 8 // spec.bits, columns)


def _turned(codes: jax.Array) -> jax.Array:
    """Return codes with j and q of `by_outputs` exchanged: its own inverse."""
    return jnp.swapaxes(codes.reshape(*codes.shape[:-1], -1, 4, 4, 2), -2, -3).reshape(codes.shape)


def dense(spec: Spec, w: Packed, dtype: jnp.dtype) -> Float[Array, "*l i o"]:
    """Return the matrix in a dtype."""
    w = by_rows(w)
    codes = unpack(w.codes) if spec.bits == 4 else w.codes
    *layers, i, o = codes.shape
    grouped = codes.reshape(*layers, w.scales.shape[-2], -1, o)
    zeros = None if w.zeros is None else w.zeros[..., None, :]
    return values(spec, grouped, w.scales[..., None, :], zeros, dtype).reshape(*layers, i, o)


def values(spec: Spec, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Return what unpacked codes stand for, with scales and zeros that broadcast against them."""
    found = codes.astype(jnp.float32) if spec.book is None else jnp.asarray(spec.book, jnp.float32)[codes.astype(jnp.int32)]
    found = found if zeros is None else found - zeros
    found = found * scales
    return (found if spec.unit == 1 else found * jnp.float32(spec.unit)).astype(dtype)
