"""The products on a TPU: one Pallas kernel that decodes a tile of the matrix in vector memory and multiplies it there.

Glossary: a *block* is what one step of the grid reads or writes; a *tile* is the block of the matrix, `[bi, bo]` numbers; a *group* is the
rows that share a scale. Tiles and groups do not know of each other, except that one divides the other.

    HBM     x [m, i]          codes [i/2, o] (two a byte)   scales [n, o]         y [m, o]
    VMEM    x [bm, bi]        codes [bi/2, bo]              scales [bi/g, bo]     y [bm, bo]
    step                      tile D [bi, bo], in the dtype of x          total [bm, bo] float32 += x D

The grid is (rows, output, contraction); `x Dᵀ` is the same kernel with `[bm, bo]` in, `[bm, bi]` out and the other side contracted, so no
transposed copy of the bytes exists. It must equal `reference`: a tile bit for bit, sums up to their order. Products of bfloat16 are exact
in float32; those of float32 are taken at the highest precision, which is six passes of the matrix unit.

A byte holds two neighbours of one column, so `bitcast` to 4 bits is free: row j of bytes becomes rows 2j and 2j + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ftjax.kernels.int4_matmul.decode import Packed, Spec

LANES, SUBLANES = 128, 8
"""Of a vector register, 32 bits each."""
SIGNED = (*map(float, range(8)), *map(float, range(-8, 0)))
UNSIGNED = tuple(map(float, range(16)))


class Tiles(NamedTuple):
    """The sizes of blocks."""

    rows: int
    i: int
    o: int


def unfit(spec: Spec, rows: int, w: Packed, dtype: jnp.dtype) -> str | None:
    """Return why the kernel cannot take a product, or None."""
    if w.codes.dtype not in (jnp.uint8, jnp.int8):
        return f"codes two a byte, or signed bytes, are expected, not {w.codes.dtype}."
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"bfloat16 or float32 is expected, not {jnp.dtype(dtype).name}; set model.dtype."
    i, o, n = w.codes.shape[-2] * 8 // spec.bits, w.codes.shape[-1], w.scales.shape[-2]
    if i // n % 32:
        return f"groups of a multiple of 32 rows are expected, not of {i // n}; quantise with group=64."
    if choose(rows, i, o, i // n) is None:
        return f"sides that a multiple of {LANES} divides, or of at most {WHOLE}, are expected, not {[i, o]} in groups of {i // n}."
    return None


def product(spec: Spec, x: jax.Array, w: Packed, *, tiles: Tiles | None = None, interpret=False) -> jax.Array:
    """Return `x D`, `[m, i] -> [m, o]`, in the dtype of x."""
    return _call(spec, x, w, tiles, interpret, transposed=False)


def product_transposed(spec: Spec, x: jax.Array, w: Packed, *, tiles: Tiles | None = None, interpret=False) -> jax.Array:
    """Return `x Dᵀ`, `[m, o] -> [m, i]`, in the dtype of x."""
    return _call(spec, x, w, tiles, interpret, transposed=True)


def _call(spec: Spec, x: jax.Array, w: Packed, tiles: Tiles | None, interpret, *, transposed: bool) -> jax.Array:
    m, i, o, n = x.shape[0], w.codes.shape[0] * 8 // spec.bits, w.codes.shape[1], w.scales.shape[0]
    group = i // n
    bm, bi, bo = tiles or choose(m, i, o, group)
    along_i, along_o = (1, 2) if transposed else (2, 1)  # axes of the grid; the last one is summed over
    shared = max(1, group // bi)  # tiles that one row of scales serves
    wide = pl.BlockSpec((bm, bi), lambda *at: (at[0], at[along_i]))
    tall = pl.BlockSpec((bm, bo), lambda *at: (at[0], at[along_o]))
    codes = pl.BlockSpec((bi * spec.bits // 8, bo), lambda *at: (at[along_i], at[along_o]))
    bg = max(1, bi // group)
    flat = bg % SUBLANES == 0 or bg == n  # else rows of scales must be an axis of their own to be cut, which costs a copy of them
    middle = () if flat else (1,)
    scales = pl.BlockSpec((bg, *middle, bo), lambda *at: (jax.lax.div(at[along_i], shared), *(0 for _ in middle), at[along_o]))
    of_groups = [array.reshape(n, *middle, o) for array in (w.scales, w.zeros) if array is not None]
    size, kept = (i, bi) if transposed else (o, bo)
    return pl.pallas_call(
        functools.partial(_kernel, spec, transposed, w.zeros is not None),
        grid=(pl.cdiv(m, bm), *((i // bi, o // bo) if transposed else (o // bo, i // bi))),
        in_specs=[tall if transposed else wide, codes, *(scales for _ in of_groups)],
        out_specs=wide if transposed else tall,
        out_shape=jax.ShapeDtypeStruct((m, size), x.dtype),
        scratch_shapes=[pltpu.VMEM((bm, kept), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem(spec, Tiles(bm, bi, bo), group, x.dtype)
        ),
        interpret=interpret,
        name="int4_product_transposed" if transposed else "int4_product",
    )(x, w.codes, *of_groups)


def _kernel(spec: Spec, transposed: bool, zeroed: bool, x, codes, scales, *rest) -> None:
    zeros, out, total = rest if zeroed else (None, *rest)
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    tile = _tile(spec, codes[...], scales[...], zeros[...] if zeroed else None, x.dtype)
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    total[...] += jax.lax.dot_general(x[...], tile, contracted, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


def _tile(spec: Spec, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Return the numbers of a tile: `decode.values`, in what a TPU core can do."""
    found = _numbers(spec, codes)
    i, o = found.shape
    by_group = (scales.shape[0], 1, o)
    found = found.reshape(scales.shape[0], -1, o)
    found = found if zeros is None else found - zeros.reshape(by_group)
    found = found * scales.reshape(by_group)
    return (found if spec.unit == 1 else found * jnp.float32(spec.unit)).reshape(i, o).astype(dtype)


def _numbers(spec: Spec, codes: jax.Array) -> jax.Array:
    if spec.bits == 8:
        return codes.astype(jnp.float32)
    if spec.book == SIGNED:
        return pltpu.bitcast(codes, jnp.int4).astype(jnp.float32)
    codes = pltpu.bitcast(codes, jnp.uint4)
    if spec.book == UNSIGNED:
        return codes.astype(jnp.float32)
    codes = codes.astype(jnp.int32)
    if codes.shape[1] % LANES:
        return _select(spec.book, codes, 8)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) & 15
    table = jnp.broadcast_to(_select(spec.book, lane, 8), (codes.shape[0], LANES))
    return jnp.concatenate(
        [jnp.take_along_axis(table, codes[:, start : start + LANES], axis=1) for start in range(0, codes.shape[1], LANES)], axis=1
    )


def _select(book: tuple[float, ...], codes: jax.Array, bit: int) -> jax.Array:
    """Return the number of each code by a binary tree of selections, a bit a level."""
    if len(book) == 1:
        return jnp.full(codes.shape, book[0], jnp.float32)
    low, high = book[: len(book) // 2], book[len(book) // 2 :]
    return jnp.where((codes & bit) != 0, _select(high, codes, bit // 2), _select(low, codes, bit // 2))


TILES = ((32, Tiles(32, 512, 1024)), (None, Tiles(1024, 512, 512)))
"""`(up to so many rows, the most that a block has)`: few rows wait for the matrix, many for its decoding."""
WHOLE = 2048
"""The longest side that may be one block where it is no multiple of 128."""


def choose(rows: int, i: int, o: int, group: int) -> Tiles | None:
    """Return the blocks for so many rows of a matrix `[i, o]`; None if it cannot be cut."""
    most = next(tiles for limit, tiles in TILES if limit is None or rows <= limit)
    bi = _divisor(i, most.i, lambda size: size % group == 0 or group % size == 0)
    bo = _divisor(o, most.o, lambda size: True)
    return None if bi is None or bo is None else Tiles(_share(rows, most.rows), bi, bo)


def _share(rows: int, most: int) -> int:
    """Return the rows of a block, so that blocks are as even as whole tiles of bfloat16 allow."""
    return rows if rows <= most else -(-rows // -(-rows // most) // 16) * 16


def _divisor(size: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest block that divides a side: whole lanes, or all of it."""
    found = [block for block in range(LANES, most + 1, LANES) if size % block == 0 and fits(block)]
    if size <= most or (size <= WHOLE and max(found, default=0) < most // 2):
        return size
    return max(found, default=None)


def vmem(spec: Spec, tiles: Tiles, group: int, dtype: jnp.dtype) -> int:
    """Return the bytes of vector memory that a kernel may take: its blocks twice, its sums, what is decoded, and a quarter to spare."""
    bm, bi, bo = tiles
    item = jnp.dtype(dtype).itemsize
    blocks = bm * (bi + bo) * item + bi * bo * spec.bits // 8 + 2 * SUBLANES * max(1, bi // group) * bo * 4
    sums = 2 * bm * max(bi, bo) * 4
    decoded = bi * bo * (4 + 4 + item)
    parts = 6 * (bm * max(bi, bo) + bi * bo) if item == 4 else 0  # float32 is multiplied as three bfloat16
    return (2 * blocks + sums + decoded + parts) * 5 // 4 + 2**20
