"""The two products on Hopper's tensor cores: packed tiles come in by TMA, become bfloat16 in registers, and never exist outside.

Glossary: see `hopper_tiles` for blocks and splits, `hopper_registers` for fragments; the *sides* of a matrix are its scales and its zeros.

`forward` is (D(W)ᵀ xᵀ)ᵀ: a decoded fragment is the left operand of `wgmma` straight from registers, and the right one may be as narrow as
8 rows of x, so that few rows waste nothing. `transposed` contracts over the columns of D, which are the rows of its fragments: these go
through shared memory, as the right operand.

Shared memory of a thread block: `stages` times x (2 bytes a number), codes (half a byte) and scales; the block of the result; for
`transposed` one decoded tile a warpgroup. `hopper_tiles` counts it.

They must equal `reference.product` and `reference.product_transposed`: the decoded tiles bit by bit, the sums up to their order.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ftjax.kernels.int4_matmul.hopper_registers import LAYOUT, WORD, numbers, numbers_in_jax
from ftjax.kernels.int4_matmul.hopper_tiles import TILE, Tile

MEMORY_REGISTERS = 40
"""Of a thread of the memory warpgroup; the others share the rest."""
SEMANTICS = plgpu.LoweringSemantics.Warpgroup
"""Named, for its default is another in JAX 0.10 than in 0.12."""
Book = tuple[float, ...]
Sides = tuple[jax.Array, ...]
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # JAX 0.10


def forward(x: jax.Array, codes: jax.Array, sides: Sides, book: Book, tile: Tile, *, interpret: Any = None) -> jax.Array:
    """Return `x D(W)`, bfloat16 `[m, i] -> [m, o]`, or the sums of the splits, float32 `[splits, o, m]`.

    Args:
      x: `[m, i]`; m is a multiple of the tile's rows.
      codes: int32 `[o, i/8]` of `decode.by_outputs`; o is a multiple of 64 warpgroups, i of splits times depth.
      sides: scales, and zeros if there are any: float32 `[n, o]`.
      book: the number of each code.
      tile: the shape of a thread block's work.
      interpret: parameters of the GPU interpreter, which cannot multiply from registers: fragments then go through shared memory.
    """
    (m, i), o, group = x.shape, codes.shape[0], x.shape[1] // sides[0].shape[0]
    columns, width = tile.warpgroups * TILE, min(group, TILE)
    share = i // tile.splits
    through_memory = interpret is not None
    if tile.splits == 1:
        result, block = jax.ShapeDtypeStruct((m, o), jnp.bfloat16), _memory((tile.warpgroups, tile.rows, TILE), jnp.bfloat16)
    else:
        result, block = jax.ShapeDtypeStruct((tile.splits, o, m), jnp.float32), _memory((tile.warpgroups, TILE, tile.rows), jnp.float32)
    scratch = {"block": block}
    if through_memory:
        scratch["decoded"] = _memory((tile.warpgroups, TILE, width), jnp.bfloat16)

    def body(x_ref, codes_ref, *refs, block, decoded=None):
        *side_refs, result_ref = refs
        warpgroup = jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * TILE, TILE)
        rows = pl.ds(jax.lax.axis_index("rows") * tile.rows, tile.rows)
        first, split = jax.lax.axis_index("columns") * columns, jax.lax.axis_index("split")

        def step(_, x, packed, *rest):
            *near, total = rest
            for at in range(0, tile.depth, TILE):
                fragment = _numbers(packed.at[mine, pl.ds(at // WORD, TILE // WORD)], book, through_memory)
                for start in range(0, TILE, width):
                    part = _scaled(_columns(fragment, start, width), [side.at[(at + start) // group, mine] for side in near])
                    right = x.at[:, pl.ds(at + start, width)].T
                    if through_memory:
                        decoded[warpgroup] = part
                        plgpu.commit_smem()
                        plgpu.wgmma(total, decoded.at[warpgroup], right)
                        plgpu.wgmma_wait(0)
                    else:
                        plgpu.wgmma(total, part, right)
            plgpu.wgmma_wait(0)
            return total

        def finish(total):
            if tile.splits == 1:
                block.at[warpgroup].T[...] = plgpu.layout_cast(total.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
                to = result_ref.at[rows, pl.ds(first + warpgroup * TILE, TILE)]
            else:
                block[warpgroup] = total
                to = result_ref.at[split, pl.ds(first + warpgroup * TILE, TILE), rows]
            _stored(block.at[warpgroup], to)

        steps = share // tile.depth
        groups = max(1, tile.depth // group)
        side = _spec((groups, columns), lambda k: ((split * share + k * tile.depth) // (group * groups), 0))
        specs = [
            _spec((tile.rows, tile.depth), lambda k: (0, split * steps + k), 2, width),
            _spec((columns, tile.depth // WORD), lambda k: (0, split * steps + k), 4, TILE // WORD),
            *[side] * len(sides),
        ]
        pipeline = _pipeline(step, finish, specs, tile, steps, total=(TILE, tile.rows))
        own = pl.ds(first, columns)
        pipeline(x_ref.at[rows, :], codes_ref.at[own, :], *(ref.at[:, own] for ref in side_refs))

    grid = {"columns": o // columns, "rows": m // tile.rows, "split": tile.splits}
    return _kernel(body, result, scratch, grid, tile, interpret)(x, codes, *sides)


def transposed(y: jax.Array, codes: jax.Array, sides: Sides, book: Book, tile: Tile, *, interpret: Any = None) -> jax.Array:
    """Return `y D(W)ᵀ`, bfloat16 `[m, o] -> [m, i]`, from the same codes.

    Args:
      y: `[m, o]`; m is a multiple of the tile's rows, o of its depth, 64.
      codes: int32 `[o, i/8]`; i is a multiple of warpgroups times columns.
      sides: as in `forward`.
      book: as in `forward`.
      tile: the shape of a thread block's work.
      interpret: parameters of the GPU interpreter.
    """
    (m, o), i = y.shape, codes.shape[1] * WORD
    group = i // sides[0].shape[0]
    columns, width = tile.warpgroups * tile.columns, min(group, TILE)
    scratch = {
        "block": _memory((tile.warpgroups, tile.rows, tile.columns), jnp.bfloat16),
        "decoded": _memory((tile.warpgroups, tile.depth, tile.columns), jnp.bfloat16, width),
    }

    def body(y_ref, codes_ref, *refs, block, decoded):
        *side_refs, result_ref = refs
        warpgroup = jax.lax.axis_index("warpgroup")
        rows = pl.ds(jax.lax.axis_index("rows") * tile.rows, tile.rows)
        first = jax.lax.axis_index("columns") * columns

        def step(_, y, packed, *rest):
            *near, total = rest
            for at in range(0, tile.columns, TILE):
                begin, word = warpgroup * tile.columns + at, warpgroup * (tile.columns // WORD) + at // WORD
                fragment = _numbers(packed.at[:, pl.ds(word, TILE // WORD)], book, interpret is not None)
                for start in range(0, TILE, width):
                    of = (begin + start) // group if columns > group else 0
                    part = _scaled(_columns(fragment, start, width), [side.at[of] for side in near])
                    decoded[warpgroup, :, at + start : at + start + width] = part
            plgpu.commit_smem()
            plgpu.wgmma(total, y, decoded.at[warpgroup])
            plgpu.wgmma_wait(0)
            return total

        def finish(total):
            block[warpgroup] = total.astype(jnp.bfloat16)
            _stored(block.at[warpgroup], result_ref.at[rows, pl.ds(first + warpgroup * tile.columns, tile.columns)])

        groups = max(1, columns // group)
        specs = [
            _spec((tile.rows, tile.depth), lambda k: (0, k), 2, width),
            _spec((tile.depth, columns // WORD), lambda k: (k, 0), 4, TILE // WORD),
            *[_spec((groups, tile.depth), lambda k: (first // (group * groups), k))] * len(sides),
        ]
        pipeline = _pipeline(step, finish, specs, tile, o // tile.depth, total=(tile.rows, tile.columns))
        pipeline(y_ref.at[rows, :], codes_ref.at[:, pl.ds(jax.lax.axis_index("columns") * (columns // WORD), columns // WORD)], *side_refs)

    grid = {"columns": i // columns, "rows": m // tile.rows}
    return _kernel(body, jax.ShapeDtypeStruct((m, i), jnp.bfloat16), scratch, grid, tile, interpret)(y, codes, *sides)


def _numbers(codes, book, in_jax: bool) -> jax.Array:
    return numbers_in_jax(codes[...], book) if in_jax else numbers(_load(codes, LAYOUT), book)


def _load(ref, layout) -> jax.Array:
    return plgpu.load(ref, (), layout=layout) if _LOAD_TAKES_INDEX else plgpu.load(ref, layout=layout)


def _columns(fragment: jax.Array, start: int, width: int) -> jax.Array:
    return fragment if width == TILE else fragment[:, start : start + width]


def _scaled(numbers: jax.Array, sides) -> jax.Array:
    """Return `(number - zero) · scale` as `decode.values` does, rounded once."""
    scales, *zeros = [_load(side, LAYOUT.reduce(1)) for side in sides]
    for zero in zeros:
        numbers = numbers - jax.lax.broadcast_in_dim(zero, numbers.shape, [0])
    return (numbers * jax.lax.broadcast_in_dim(scales, numbers.shape, [0])).astype(jnp.bfloat16)


def _stored(block, to) -> None:
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, to)
    plgpu.wait_smem_to_gmem(0)


def _pipeline(step, finish, specs, tile: Tile, steps: int, *, total: tuple[int, int]):
    def compute(run):
        @functools.partial(pl.run_scoped, sums=plgpu.ACC(total, jnp.float32))
        def _(sums):
            run(sums)
            finish(sums[...])

    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=tile.warpgroups,
        memory_registers=MEMORY_REGISTERS,
        max_concurrent_steps=min(tile.stages, steps),
        compute_context=compute,
    )


def _kernel(body, result, scratch, grid: dict[str, int], tile: Tile, interpret: Any):
    return plgpu.kernel(
        body,
        out_type=result,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=SEMANTICS),
        **({} if interpret is None else {"interpret": interpret}),
    )


def _spec(shape: tuple[int, int], index, size: int = 0, width: int = 0) -> plgpu.BlockSpec:
    """Return a block of numbers of so many bytes that is read in pieces of this width; size 0: as it lies."""
    return plgpu.BlockSpec(shape, index, memory_space=plgpu.SMEM, transforms=_transforms(size * width, width) if size else ())


def _memory(shape: tuple[int, ...], dtype: jnp.dtype, width: int | None = None):
    size = jnp.dtype(dtype).itemsize
    row = min(128, size * (width or shape[-1]))
    return plgpu.SMEM(shape, dtype, transforms=_transforms(row, row // size))


def _transforms(row: int, numbers: int):
    """Return tiles of 8 rows of so many bytes, swizzled as far as they reach."""
    return plgpu.TilingTransform((8, numbers)), plgpu.SwizzleTransform(row)
