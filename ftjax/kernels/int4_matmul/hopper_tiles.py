"""How Hopper's kernels cut a product: the shape of a thread block's work, its shared memory, and an estimate of its cycles.

Glossary: a *block* `[rows, columns]` of the result belongs to a thread block of one memory warpgroup, which keeps `stages` steps of `depth`
in flight, and one or two warpgroups that compute, each its columns. A *split* is a share of the contraction.

The estimate has not met a GPU: experiments/int4_speed/gpu.py times what it chooses beside other tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

TILE = 64
"""Rows and columns that a warpgroup decodes at a time."""
MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200: how many thread blocks run at a time, for each fills one."""
SHARED_BYTES = 232_448
"""That a thread block can have."""
CYCLES = 160
"""To decode a fragment in one warpgroup beside another: counted in the machine code, about 150 to 170 instructions."""
PRODUCTS = 2048
"""Multiplications a cycle of one multiprocessor's tensor cores."""
OVERHEAD = 2000
"""Cycles of a thread block that are not its steps: a guess."""


class Tile(NamedTuple):
    """The shape of a thread block's work."""

    rows: int
    """Of x: 8 to 256, in `transposed` 64 or 128."""
    warpgroups: int
    """That compute: 1 or 2."""
    depth: int
    """Of the contraction, a step."""
    splits: int = 1
    """Thread blocks that share a contraction; more than one leave float32 sums `[splits, o, m]`."""
    columns: int = TILE
    """Of the result, a warpgroup: 64, in `transposed` also 128."""
    stages: int = 4


def forward_bytes(tile: Tile, group: int, sides: int) -> int:
    """Return the shared memory of `forward`."""
    columns = tile.warpgroups * TILE
    scales = 4 * columns * max(1, tile.depth // group)
    stage = 2 * tile.rows * tile.depth + columns * tile.depth // 2 + sides * scales
    return tile.stages * stage + tile.rows * columns * (2 if tile.splits == 1 else 4)


def transposed_bytes(tile: Tile, group: int, sides: int) -> int:
    """Return the shared memory of `transposed`."""
    columns = tile.warpgroups * tile.columns
    scales = 4 * tile.depth * max(1, columns // group)
    stage = 2 * tile.rows * tile.depth + columns * tile.depth // 2 + sides * scales
    return tile.stages * stage + 2 * columns * (tile.rows + tile.depth)


def forward_tile(m: int, i: int, o: int, *, group: int, sides: int) -> Tile:
    """Return the tile of `forward` that should take the fewest cycles."""
    warpgroups = 2 if o % (2 * TILE) == 0 else 1

    def tiles() -> Iterable[Tile]:
        for rows in (rows for rows in (256, 128, 64, 32, 16, 8) if rows < 2 * m or rows == 8):
            for splits in (1, 2, 4, 8, 16) if rows <= TILE else (1,):
                share = i // splits
                if i % (splits * TILE) == 0 and (share % group == 0 or group % share == 0):
                    yield Tile(rows, warpgroups, _depth(share, group) if rows <= 16 else TILE, splits)

    def cycles(tile: Tile) -> float:
        blocks = math.ceil(m / tile.rows) * (o // (warpgroups * TILE)) * tile.splits
        return _cycles(blocks, i // TILE // tile.splits, tile.rows, TILE, warpgroups) + (tile.splits > 1) * OVERHEAD

    tile = min(tiles(), key=cycles)
    return _filled(tile, i // tile.splits // tile.depth, lambda tile: forward_bytes(tile, group, sides))


def transposed_tile(m: int, i: int, o: int, *, group: int, sides: int) -> Tile:
    """Return the tile of `transposed` that should take the fewest cycles."""
    tiles = [
        Tile(rows, warpgroups, TILE, columns=columns)
        for rows in (128, 64)
        for warpgroups, columns in ((2, 128), (2, 64), (1, 64))
        if i % (warpgroups * columns) == 0 and (warpgroups * columns % group == 0 or group % (warpgroups * columns) == 0)
    ]

    def cycles(tile: Tile) -> float:
        blocks = math.ceil(m / tile.rows) * (i // (tile.warpgroups * tile.columns))
        return _cycles(blocks, o // TILE, tile.rows, tile.columns, tile.warpgroups)

    return _filled(min(tiles, key=cycles), o // TILE, lambda tile: transposed_bytes(tile, group, sides))


def _cycles(blocks: int, steps: int, rows: int, columns: int, warpgroups: int) -> float:
    """Return the cycles of so many thread blocks: a warpgroup decodes and then multiplies, two at once share the units for either."""
    multiply, decode = rows * columns * TILE / PRODUCTS, CYCLES * columns / TILE
    step = max(multiply + decode, warpgroups * multiply, warpgroups * decode)
    return math.ceil(blocks / MULTIPROCESSORS) * (steps * step + OVERHEAD)


def _depth(share: int, group: int) -> int:
    """Return the deepest step of a few rows' product that divides its share of the contraction into whole groups, or a group evenly."""
    return next(depth for depth in (256, 128, TILE) if share % depth == 0 and (depth % group == 0 or group % depth == 0))


def _filled(tile: Tile, steps: int, size) -> Tile:
    """Return the tile with as many stages as there are steps and shared memory for, at most 8."""
    stages = next(stages for stages in range(8, 0, -1) if size(tile._replace(stages=stages)) <= SHARED_BYTES - 1024)  # barriers
    return tile._replace(stages=min(stages, steps))
