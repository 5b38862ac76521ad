"""Products on a mesh: every device multiplies its own part of the matrix, since no compiler can split a kernel by itself.

A matrix that is split by columns needs no word between devices; of one that is split by rows each device has a part of every sum. `x Dᵀ` is
the other way round. Rows that share a scale stay together: where groups do not divide over the devices, the side is whole on each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.kernels.int4_matmul import decode, implementations
from ftjax.kernels.int4_matmul.decode import Packed, Spec


class Place(NamedTuple):
    """Where rows and a matrix lie; an entry is that of a `PartitionSpec`."""

    mesh: Mesh
    rows: tuple[str, ...]
    """The axes that the first axis of x is split over, if they divide it."""
    i: Any
    o: Any


def run(direction: str, spec: Spec, implementation: str, place: Place | None, x: jax.Array, w: Packed) -> jax.Array:
    """Return the product of this name of `[..., i]` or `[..., o]`, on every device that of its part."""

    def one(x: jax.Array, w: Packed) -> jax.Array:
        rows = implementations.run(direction, spec, implementation, x.reshape(-1, x.shape[-1]), w)
        return rows.reshape(*x.shape[:-1], -1)

    if place is None:
        return one(x, w)
    i, o = _sides(place, spec, w)
    summed, kept = (i, o) if direction == "product" else (o, i)
    lead = _lead(place, x)

    def part(x: jax.Array, w: Packed) -> jax.Array:
        return one(x, w) if summed is None else jax.lax.psum(one(x, w), summed)

    # Nothing is differentiated through it, so nothing needs to know what varies where; and Pallas does not say.
    arrays = (P(*lead, summed), specs(place, spec, w))
    return jax.shard_map(part, mesh=place.mesh, in_specs=arrays, out_specs=P(*lead, kept), check_vma=False)(x, w)


def gathered(place: Place | None, x: jax.Array) -> jax.Array:
    """Return `[..., n]` with the whole of its last axis on each device that has the row."""
    if place is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, P(*_lead(place, x), None)))


def specs(place: Place, spec: Spec, w: Packed) -> Packed:
    """Return where each array of a matrix lies while it multiplies."""
    i, o = _sides(place, spec, w)
    of_groups = P(i if w.scales.shape[-2] > 1 else None, o)
    return Packed(P(o, i) if w.codes.dtype == jnp.int32 else P(i, o), of_groups, None if w.zeros is None else of_groups)


def part(place: Place, spec: Spec, w: Packed) -> Packed:
    """Return the shapes of a device's part of a matrix."""

    def shard(array: jax.Array, where: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([size // _parts(place, entry) for size, entry in zip(array.shape, where, strict=True)], array.dtype)

    return jax.tree.map(shard, w, specs(place, spec, w))


def _lead(place: Place, x: jax.Array) -> tuple[Any, ...]:
    """Return what the axes of x before its last are split over."""
    if x.ndim == 1:
        return ()
    return (None if x.shape[0] % _parts(place, place.rows) else place.rows, *(None,) * (x.ndim - 2))


def _sides(place: Place, spec: Spec, w: Packed) -> tuple[Any, Any]:
    """Return what the sides of the matrix are split over, None where groups or columns do not divide."""
    (i, o), n = decode.shape(spec, w), w.scales.shape[-2]
    whole = n % _parts(place, place.i) if n > 1 else i % (2 * _parts(place, place.i))
    return None if whole else place.i, None if o % _parts(place, place.o) else place.o


def _parts(place: Place, entry: Any) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(place.mesh.shape[name] for name in names)
