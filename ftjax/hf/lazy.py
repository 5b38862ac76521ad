"""Arrays that are still in a file: a shape, a dtype, and a way to read any block of them.

Safetensors, GGUF and export all speak of these, so a loader can fill a stacked weight layer by layer and a host of a mesh can read its own
shards only, whatever the file format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """An array `[*shape]` that is read on demand; invariant: `read(index)` equals `read()[index]`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Index], np.ndarray]
    """`fetch(one slice per axis)`: the block, in `dtype`; steps are 1."""
    packed: Any = None
    """The quantised matrix `[i, o]` of lazy arrays that the numbers are decoded from, if they are."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self, index: Index = ()) -> np.ndarray:
        """Return the block at `index` (slices, for the leading axes; all of the array by default)."""
        return self.fetch(tuple(index) + (slice(None),) * (self.ndim - len(index)))


def from_array(array: np.ndarray) -> LazyTensor:
    """Return an array that is in memory already as a lazy one."""
    return LazyTensor(array.shape, array.dtype, lambda index: array[index])


def swap(tensor: LazyTensor) -> LazyTensor:
    """Return the matrix transposed: PyTorch's `[o, i]` as our `[i, o]`."""
    return LazyTensor(tensor.shape[::-1], tensor.dtype, lambda index: tensor.read(index[::-1]).T)


def cast(tensor: LazyTensor, dtype: np.dtype) -> LazyTensor:
    """Return the array in another dtype, rounded to nearest even."""
    dtype = np.dtype(dtype)
    if dtype == tensor.dtype:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda index: tensor.read(index).astype(dtype))


def stack(layers: Sequence[LazyTensor]) -> LazyTensor:
    """Return `[L, *shape]`; reading fills one preallocated array layer by layer, so that no second copy of the stack ever exists."""
    shape, dtype = layers[0].shape, layers[0].dtype

    def fetch(index: Index) -> np.ndarray:
        chosen, rest = layers[index[0]], index[1:]
        block_shape = (len(range(*cut.indices(size))) for cut, size in zip(rest, shape, strict=True))
        out = aligned_empty((len(chosen), *block_shape), dtype)
        for place, layer in enumerate(chosen):
            out[place] = layer.read(rest)
        return out

    return LazyTensor((len(layers), *shape), dtype, fetch)


def unstacked(tensor: LazyTensor, layer: int) -> LazyTensor:
    """Return one layer of a stack."""
    return LazyTensor(tensor.shape[1:], tensor.dtype, lambda index: tensor.read((slice(layer, layer + 1), *index))[0])


def aligned(tensor: LazyTensor) -> LazyTensor:
    """Return the array, to be read into memory that a device of the host takes over without a copy."""
    return LazyTensor(tensor.shape, tensor.dtype, lambda index: stack([tensor]).read((slice(None), *index))[0])


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array at an address that XLA:CPU takes over without copying it (a multiple of 64 bytes)."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
