"""The products on a Hopper GPU: which its kernels take, and how rows are made ready for them.

What has been run (2026-11-24; there was no GPU): the kernels are lowered for an H100 on JAX 0.10.2 and 0.12, and the GPU interpreter of
0.12 runs them with its race detection, except that there fragments are decoded by plain JAX and multiplied from shared memory. On JAX 0.12
they were compiled to machine code for sm_90a too (experiments/int4_speed/machine_code.py), with at most 16 bytes of spilled registers.
**No GPU has executed them**: how fragments are decoded there, `wgmma` from registers and all that is said of time is unproven. Tests marked
`gpu` and experiments/int4_speed/gpu.py are for the day that there is one.

Codes must lie as `decode.by_outputs` puts them, once, before the run: `ftjax.quant.for_hopper`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.kernels.int4_matmul import decode
from ftjax.kernels.int4_matmul.decode import Packed, Spec
from ftjax.kernels.int4_matmul.hopper_tiles import TILE, Tile, forward_tile, transposed_tile


def product(spec: Spec, x: jax.Array, w: Packed, *, tile: Tile | None = None, interpret: Any = None) -> jax.Array:
    """Return `x D`, `[m, i] -> [m, o]`, in bfloat16; by a tile of one's own and in the GPU interpreter, if these are given."""
    (i, o), m = decode.shape(spec, w), x.shape[0]
    tile = tile or forward_tile(m, i, o, group=i // w.scales.shape[-2], sides=len(_sides(w)))
    y = _kernels().forward(_padded(x, tile.rows), w.codes, _sides(w), spec.book, tile, interpret=interpret)
    return (y if tile.splits == 1 else jnp.sum(y, axis=0).T.astype(x.dtype))[:m]


def product_transposed(spec: Spec, x: jax.Array, w: Packed, *, tile: Tile | None = None, interpret: Any = None) -> jax.Array:
    """Return `x Dᵀ`, `[m, o] -> [m, i]`, in bfloat16; tile and interpreter as in `product`."""
    (i, o), m = decode.shape(spec, w), x.shape[0]
    tile = tile or transposed_tile(m, i, o, group=i // w.scales.shape[-2], sides=len(_sides(w)))
    return _kernels().transposed(_padded(x, tile.rows), w.codes, _sides(w), spec.book, tile, interpret=interpret)[:m]


def unfit(spec: Spec, rows: int, w: Packed, dtype: jnp.dtype) -> str | None:
    """Return why the kernels cannot multiply so many rows of a dtype by a matrix, given by its shapes, or None if they can."""
    if reason := unfit_matrix(spec, *decode.shape(spec, w), w.scales.shape[-2]):
        return reason
    if w.codes.dtype != jnp.int32:
        return "the codes lie by rows, and its kernels read them by outputs; lay them out once with ftjax.quant.for_hopper."
    if w.codes.ndim != 2:
        return f"one matrix is expected, not a stack {list(w.codes.shape)}; scan over its layers."
    if any(side.dtype != jnp.float32 for side in _sides(w)):
        return f"scales and zeros must be float32, not {' and '.join(str(side.dtype) for side in _sides(w))}."
    if dtype != jnp.bfloat16:
        return f"its tensor cores multiply bfloat16, not {dtype}; use model.dtype 'bfloat16'."
    return unfit_device() if rows else "there are no rows to multiply."


def unfit_matrix(spec: Spec, i: int, o: int, groups: int) -> str | None:
    """Return why the kernels cannot take a matrix `[i, o]` with so many groups of rows, however it lies, or None."""
    if spec.bits != 4 or spec.book is None or spec.unit != 1:
        return f"its kernels read codes of 4 bits without a unit, not of {spec.bits}; quantise to nf4, fp4, int4 or uint4."
    if i % TILE or o % TILE:
        return f"rows and columns must be multiples of {TILE}, and the matrix is {[i, o]}."
    if i % groups or (i // groups != 32 and i // groups % TILE):
        return f"groups of 32 rows or of a multiple of {TILE} are expected, and {i} rows are in {groups}; quantise with group 64."
    return None


def unfit_device() -> str | None:
    """Return why the device of the program is no Hopper GPU: the abstract one that it is lowered for, or the first GPU of the machine."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        known = any(name in abstract.device_kind for name in ("H100", "H800", "H20"))  # GH200 among them
        return None if known else f"a Hopper GPU is expected, and the program is for {abstract.device_kind!r}."
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return "a Hopper GPU is expected, and this machine has no GPU."
    if device.compute_capability != "9.0":
        return f"a Hopper GPU (9.0) is expected, and {device.device_kind!r} has compute capability {device.compute_capability}."
    return None


def _padded(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def _sides(w: Packed) -> tuple[jax.Array, ...]:
    return (w.scales,) if w.zeros is None else (w.scales, w.zeros)


def _kernels():
    from ftjax.kernels.int4_matmul import hopper_kernels  # takes 0.3 s to import, and only programs for GPUs need it

    return hopper_kernels
