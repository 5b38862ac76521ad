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
    """uint8 `[..., i/2, o]`, or int8 `[..., i, o]`, or int32 `[..., o, i/8]` (see `by_outputs`)."""
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
    """Return 4-bit codes as int32 `[..., o, i/8]`: column c of the matrix is a row of words, and 8 words are 64 of its codes.

    Word 2j + h of the 8 holds the codes 32h + 8q + 2j + b, for q from 0 to 3 and b 0 or 1, at its bits 4 (2q + b): those whose numbers the
    thread that reads the word holds for the tensor cores. (Words, not int4: XLA hands a kernel a layer of a stack of words without a copy.)

    Raises:
      ValueError: the codes are not two a byte, or their rows are not a multiple of 64.
    """
    if w.codes.dtype != jnp.uint8 or w.codes.shape[-2] % 32:
        raise ValueError(f"int4_matmul: codes two a byte, uint8 [..., 32 n, o], are expected, not {w.codes.dtype}{list(w.codes.shape)}.")
    codes = jnp.swapaxes(unpack(w.codes), -1, -2)
    *layers, o, i = codes.shape
    nibbles = jnp.einsum("...hqjb->...jhqb", codes.reshape(*layers, o, i // 64, 2, 4, 4, 2)).reshape(*layers, o, i // 8, 8)
    words = jnp.sum(nibbles.astype(jnp.uint32) << _places(nibbles.ndim), axis=-1, dtype=jnp.uint32)
    return w._replace(codes=jax.lax.bitcast_convert_type(words, jnp.int32))


def by_rows(w: Packed) -> Packed:
    """Return codes as they were before `by_outputs`, if they were laid out by it."""
    if w.codes.dtype != jnp.int32:
        return w
    *layers, o, words = w.codes.shape
    nibbles = jax.lax.bitcast_convert_type(w.codes, jnp.uint32)[..., None] >> _places(w.codes.ndim + 1)
    nibbles = (nibbles & 15).astype(jnp.uint8)
    codes = jnp.einsum("...jhqb->...hqjb", nibbles.reshape(*layers, o, words // 8, 4, 2, 4, 2)).reshape(*layers, o, 8 * words)
    return w._replace(codes=pack(jnp.swapaxes(codes, -1, -2)))


def shape(spec: Spec, w: Packed) -> tuple[int, int]:
    """Return rows and columns of the matrix."""
    *_, rows, columns = w.codes.shape
    return (8 * columns, rows) if w.codes.dtype == jnp.int32 else (rows * 8 // spec.bits, columns)


def _places(ndim: int) -> jax.Array:
    """Return the bit at which each of the 8 codes of a word begins, on the last of so many axes."""
    return jnp.arange(0, 32, 4, dtype=jnp.uint32).reshape(*(1,) * (ndim - 1), 8)


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
