"""The products in plain JAX, on any platform: a tile of the matrix is decoded, multiplied, and gone before the next.

The loop runs over the output's columns, so nothing is carried but the result: for `x D` tiles of columns, for `x Dᵀ` tiles of rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.kernels.int4_matmul.decode import Packed, Spec, by_rows, dense
from ftjax.kernels.product import product as multiply

TILE = 2**20
"""Numbers of the matrix that exist at a time: 4 MiB in float32."""


def product(spec: Spec, x: jax.Array, w: Packed) -> jax.Array:
    """Return `x D`, `[m, i] -> [m, o]`, in the dtype of x."""
    w = by_rows(w)
    i, o = x.shape[-1], w.codes.shape[-1]

    def tile(start: jax.Array | int, columns: int) -> jax.Array:
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, columns, axis=-1), w)
        return multiply(x, dense(spec, part, x.dtype))

    return _joined(tile, o, max(1, TILE // i), x)


def product_transposed(spec: Spec, x: jax.Array, w: Packed) -> jax.Array:
    """Return `x Dᵀ`, `[m, o] -> [m, i]`, in the dtype of x."""
    w = by_rows(w)
    o, n = w.scales.shape[-1], w.scales.shape[-2]
    i = w.codes.shape[-2] * 8 // spec.bits
    group = i // n

    def tile(start: jax.Array | int, rows: int) -> jax.Array:
        part = Packed(
            _rows(w.codes, start * spec.bits // 8, rows * spec.bits // 8),
            _rows(w.scales, start // group, -(-rows // group)),
            None if w.zeros is None else _rows(w.zeros, start // group, -(-rows // group)),
        )
        return multiply(x, dense(spec, part, x.dtype), True)

    return _joined(tile, i, _whole_groups(max(1, TILE // o), group), x)


def _whole_groups(rows: int, group: int) -> int:
    """Return about so many rows: some groups, or an even share of one."""
    if rows >= group:
        return rows // group * group
    return next(share for share in range(rows, 0, -1) if group % share == 0 and (share % 2 == 0 or share == 1))


def _rows(array: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, count, axis=-2)


def _joined(tile, size: int, each: int, x: jax.Array) -> jax.Array:
    """Return the tiles `[m, each]` side by side, `[m, size]`."""
    if size <= each:
        return tile(0, size)

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, tile(index * each, each), index * each, axis=1)

    out = jax.lax.fori_loop(0, size // each, body, jnp.zeros((x.shape[0], size), x.dtype))
    rest = size % each
    return jax.lax.dynamic_update_slice_in_dim(out, tile(size - rest, rest), size - rest, axis=1) if rest else out
