"""The mesh, and how a batch lies on it.

* `data`: rows of the batch; every device holds all weights.
* `fsdp`: rows of the batch, and one side of every matrix; a layer is gathered while it is used.
* `tensor`: the other side of every matrix; activations are split over heads and hidden units.
* `context`: time. Reserved: correct, and not yet fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.types import Batch

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")
"""The axes that the rows of a batch are split over."""


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh `(data, fsdp, tensor, context)` over all devices of all processes.

    Args:
      data: size of the axis that holds rows; at most one size is -1, which takes whatever is left.
      fsdp: size of the axis that holds rows and one side of every matrix.
      tensor: size of the axis that holds the other side.
      context: size of the axis that holds time.
      devices: what to use instead of `jax.devices()`; JAX orders them by the interconnect where it knows one.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh: sizes are positive and at most one is -1, not {shown}.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh: {shown} does not multiply to {len(devices)} devices; -1 on one axis takes what is left.")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh, *, ndim: int = 2, time: bool = True) -> NamedSharding:
    """Return the sharding of `[*b, t]`, or of `[*b]` without `time`: rows over `data` and `fsdp`, time over `context`."""
    middle = (None,) * (ndim - 1 - time)
    return NamedSharding(mesh, P(ROWS, *middle, *(["context"] if time else [])))


def row_parts(mesh: Mesh) -> int:
    """Return over how many parts of the mesh the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ROWS)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Return `(index, count)`: which of how many equal parts of a batch's rows this process has to load.

    Processes that hold the same rows (where `tensor` or `context` runs across hosts) have one index.
    """
    rows = row_parts(mesh)
    blocks = batch_sharding(mesh, ndim=1, time=False).addressable_devices_indices_map((rows,)).values()
    mine = sorted({block[0].indices(rows)[0] for block in blocks})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise ValueError(f"mesh: process {jax.process_index()} would hold rows {mine} of {rows}, which are no contiguous part of a batch.")
    return mine[0] // len(mine), rows // len(mine)


def own_rows(batch: Batch, mesh: Mesh) -> Batch:
    """Return this process's rows of a batch that every process has: what `shard_batch` takes."""
    index, count = batch_share(mesh)
    own = batch.tokens.shape[0] // count
    return jax.tree.map(lambda x: x[index * own : (index + 1) * own], batch)


def whole(tree: Any) -> Any:
    """Return arrays that lie on devices of several processes as NumPy arrays, all of them in every process, which all have to ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put this process's rows of a batch on its devices, as its part of the whole batch.

    Args:
      batch: numpy arrays: the rows that `batch_share` says are this process's.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the rows or tokens do not divide over the mesh.
    """
    count = batch_share(mesh)[1]
    rows, parts = batch.tokens.shape[0] * count, row_parts(mesh)
    if rows % parts:
        raise ValueError(f"batch: {rows} rows do not divide over data*fsdp={parts} devices; choose a multiple of {parts}.")
    if batch.tokens.shape[-1] % mesh.shape["context"]:
        raise ValueError(f"batch: {batch.tokens.shape[-1]} tokens do not divide over context={mesh.shape['context']}.")

    def put(x: np.ndarray) -> jax.Array:
        where = batch_sharding(mesh, ndim=x.ndim, time=x.shape == batch.tokens.shape)
        return jax.make_array_from_process_local_data(where, np.asarray(x), (x.shape[0] * count, *x.shape[1:]))

    return jax.tree.map(put, batch)
