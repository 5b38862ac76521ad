"""A checksum of each tensor beside a folder's weights, so that a flipped bit of a code, which is a code as well, does not go unseen."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ftjax.hf.lazy import Index, LazyTensor

FILE = "checksums.json"
_KEY = "crc32"


def recorded(names: Iterable[str], arrays: Iterable[np.ndarray], sums: dict[str, int]) -> Iterator[np.ndarray]:
    """Yield the arrays, and write the checksum of each into `sums` as it passes."""
    for name, array in zip(names, arrays, strict=True):
        sums[name] = _sum(array)
        yield array


def content(sums: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return what `FILE` holds."""
    return {_KEY: dict(sums)}


def verified(tensors: Mapping[str, LazyTensor], found: Mapping[str, Mapping[str, int]], path: Path) -> dict[str, LazyTensor]:
    """Return tensors that are checked when they are first read, each as a whole and once in a process, whatever part of it is asked for.

    So every host of a mesh reads all of a folder that has checksums, and not its own shards only.

    Args:
      tensors: by their names in the file.
      found: what `FILE` holds.
      path: of it.

    Raises:
      ValueError: on reading: a tensor is not what was written, or has no checksum.
    """
    sums = found.get(_KEY)
    missing = sorted(set(tensors) - set(sums)) if isinstance(sums, Mapping) else sorted(tensors)
    if missing:
        raise ValueError(f"hf: {path} has no {_KEY} of {missing[0]!r}; remove the file if the weights beside it are others, and mean to be")
    return {name: _checked(name, tensor, sums[name], path) for name, tensor in tensors.items()}


def _checked(name: str, tensor: LazyTensor, expected: int, path: Path) -> LazyTensor:
    checked = False

    def fetch(index: Index) -> np.ndarray:
        nonlocal checked
        if checked:
            return tensor.read(index)
        found = tensor.read()
        if _sum(found) != expected:
            raise ValueError(f"hf: {name} is not what was written, says {path}: the file is damaged; download or copy it again")
        checked = True
        block = found[index]
        return block if block.shape == found.shape else block.copy()  # a view would keep the rest

    return LazyTensor(tensor.shape, tensor.dtype, fetch, tensor.packed)


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
