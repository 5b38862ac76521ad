"""Sixteen numbers looked up in the registers of a warpgroup: what Hopper's kernels do between the packed codes and the tensor cores.

Glossary: a *fragment* is a 64 x 64 tile spread over the 128 threads of a warpgroup as the tensor cores take their left operand: of a row a
thread holds 8 pairs, 8 columns apart. Packed it is 64 x 8 words in the same layout: of a row a thread holds 2 words, of 8 codes each.
`decode.by_outputs` stores codes in the order that makes a thread's words the very codes whose numbers it must hold, so that nothing moves
between threads.

A book of consecutive integers is arithmetic, and exact: the code put into the mantissa of 2^23 and 2^23 subtracted. Any other book is a
table of which each lane of a warp holds one number: a shift and a shuffle a code, where a tree of selections takes 19 instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm, nvvm

from ftjax.kernels.int4_matmul.hopper_tiles import TILE

LAYOUT = plgpu.Layout.WGMMA
WORD = 8
"""Codes in a word."""
HALVES = 0x101F
"""Of a shuffle: within each 16 lanes of a warp, so that only the lowest 4 bits of a lane's number count."""
SIGNED = (*map(float, range(8)), *map(float, range(-8, 0)))
UNSIGNED = tuple(map(float, range(16)))


class Place(NamedTuple):
    """How 4 bits at a place of a word become a number: `(word & mask) ^ flip`, read as a float32, times `factor` plus `offset`."""

    mask: int
    flip: int
    factor: float
    offset: float


def places(signed: bool) -> tuple[Place, ...]:
    """Return the lower four places; the upper four are these of the word shifted by 16. The sum is exact, and so is the product."""
    bias = 8 if signed else 0  # two's complement with its highest bit flipped counts from -8 on
    return tuple(
        Place(15 << at, 0x4B000000 | (bias << at), 2.0**-at, -(2.0 ** (23 - at) + bias))  # 0x4B000000 is 2^23
        for at in (0, 4, 8, 12)
    )


def numbers(codes: jax.Array, book: tuple[float, ...]) -> jax.Array:
    """Return the numbers of a fragment of codes, int32 `[64, 8]` -> float32 `[64, 64]`, as instructions of the GPU."""
    shape = plgpu.ShapeDtypeStruct((TILE, TILE), jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=shape)
    def inline(_, codes):
        read = _integers(signed=book == SIGNED) if book in (SIGNED, UNSIGNED) else _table(book)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        found = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((TILE, TILE)), dtype=object)
        for at, words in np.ndenumerate(codes.registers):  # at[4]: which 8 of 16 rows
            sixteen = [number for half in range(2) for number in read(vector.extract(words, [], [half]))]
            for block in range(8):
                found[(0, block, *at[2:])] = vector.from_elements(pair, sixteen[2 * block : 2 * block + 2])
        return mgpu.FragmentedArray(_registers=found, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return inline(codes)


def numbers_in_jax(codes: jax.Array, book: tuple[float, ...]) -> jax.Array:
    """Return the same numbers as plain JAX, which the GPU interpreter can run: a tree of selections on the four bits."""
    codes = codes[:, :, None] >> (4 * jax.lax.broadcasted_iota(jnp.int32, (1, 1, WORD), 2))
    codes = jnp.transpose(codes.reshape(TILE, 4, 2, 4, 2), (0, 2, 3, 1, 4)).reshape(TILE, TILE)
    level = [jnp.full(codes.shape, number, jnp.float32) for number in book]
    for bit in range(4):
        on = (codes & (1 << bit)) != 0
        level = [jnp.where(on, upper, lower) for lower, upper in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _integers(signed: bool) -> Callable[[ir.Value], Sequence[ir.Value]]:
    """Return what reads the 8 codes of a word as integers: a logical operation and a fused multiplication each."""

    def one(word: ir.Value, place: Place) -> ir.Value:
        factor, offset = (f"0f{np.float32(number).view(np.uint32):08X}" for number in (place.factor, place.offset))
        # 0x6a is (a & b) ^ c.
        code = f"""{{
            .reg .b32 t;
            lop3.b32 t, $1, {place.mask:#x}, {place.flip:#x}, 0x6a;
            fma.rn.f32 $0, t, {factor}, {offset};
        }}"""
        return llvm.inline_asm(ir.F32Type.get(), [word], code, "=f,r")

    def read(word: ir.Value) -> Sequence[ir.Value]:
        halves = (word, arith.shrui(word, mgpu.c(16, _i32())))
        return [one(half, place) for half in halves for place in places(signed)]

    return read


def _table(book: tuple[float, ...]) -> Callable[[ir.Value], Sequence[ir.Value]]:
    """Return what reads the 8 codes of a word by a shuffle each, from the lane of that number among the 16 that the thread is one of."""
    lane, level = mgpu.thread_idx(), [mgpu.c(number, ir.F32Type.get()) for number in book]
    for bit in range(4):
        on = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, mgpu.c(1 << bit, _i32())), mgpu.c(0, _i32()))
        level = [arith.select(on, upper, lower) for lower, upper in zip(level[::2], level[1::2], strict=True)]
    mine = mgpu.utils.bitcast(level[0], _i32())

    def one(lane: ir.Value) -> ir.Value:
        everyone, halves = mgpu.c(0xFFFFFFFF, _i32()), mgpu.c(HALVES, _i32())
        found = nvvm.shfl_sync(everyone, mine, lane, halves, nvvm.ShflKind.idx, results=[_i32()])
        return mgpu.utils.bitcast(found, ir.F32Type.get())

    def read(word: ir.Value) -> Sequence[ir.Value]:
        return [one(arith.shrui(word, mgpu.c(4 * at, _i32())) if at else word) for at in range(8)]

    return read
