"""The tensors of one quantised matrix in a file, asked for by name: they must be there, have their shape and hold sound numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ftjax.hf.lazy import Index, LazyTensor, cast
from ftjax.quant import QuantizedWeight
from ftjax.quant.permuted import PermutedWeight

FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
DTYPES = {dtype.name: dtype for dtype in FLOATS}


class Parts(NamedTuple):
    """What a file holds of a matrix."""

    module: str
    """Hugging Face's name of it, `model.layers.0.self_attn.q_proj`."""
    tensors: Mapping[str, LazyTensor]
    """By what follows the module's name and a dot."""
    settings: Mapping[str, Any]
    """The `quantization_config`."""
    dtype: np.dtype
    """That of the model in its config."""

    def error(self, part: str, problem: str) -> ValueError:
        """Return the error that names one of the tensors."""
        return ValueError(f"{self.module}.{part} {problem}")

    def take(self, part: str, shape: Sequence[int] | None, dtypes: Sequence[Any]) -> LazyTensor:
        """Return a tensor that has this shape and one of these dtypes."""
        if part not in self.tensors:
            there = ", ".join(f"{self.module}.{name}" for name in sorted(self.tensors))
            raise self.error(part, f"is missing beside {there}")
        tensor, dtypes = self.tensors[part], [np.dtype(dtype) for dtype in dtypes]
        if tensor.dtype not in dtypes:
            raise self.error(part, f"is {tensor.dtype.name}, expected {' or '.join(dtype.name for dtype in dtypes)}")
        if shape is not None and tensor.shape != tuple(shape):
            raise self.error(
                part, f"is {list(tensor.shape)}, expected {list(shape)}: the tensors of the matrix are of two models, or cut off"
            )
        return tensor

    def numbers(self, part: str, shape: Sequence[int], dtypes: Sequence[Any] = FLOATS, *, low: float = -math.inf) -> LazyTensor:
        """Return a tensor as float32, of which every number that is read is finite and at least `low`."""
        tensor = cast(self.take(part, shape, dtypes), np.float32)

        def fetch(index: Index) -> np.ndarray:
            block = tensor.read(index)
            if not (np.isfinite(block).all() and (block >= low).all()):
                kind = "finite" if low == -math.inf else f"finite and at least {low:g}"
                raise ValueError(
                    f"hf: {self.module}.{part} holds numbers that are not {kind}: the file is damaged; download or copy it again"
                )
            return block

        return LazyTensor(tensor.shape, tensor.dtype, fetch)


class Unfit(ValueError):
    """A matrix that a layout of files has no place for; the message says why."""


def require(condition: bool, problem: str) -> None:
    """Raise `Unfit` unless the condition holds."""
    if not condition:
        raise Unfit(problem)


def spans(index: Index, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the end of each slice of an index."""
    return [(cut.indices(size)[0], max(cut.indices(size)[:2])) for cut, size in zip(index, shape, strict=True)]


def grid(flat: LazyTensor, rows: int, columns: int, dtype: Any = None) -> LazyTensor:
    """Return numbers that a file holds one after the other, in a shape of one long axis, as a matrix; reads whole rows.

    Args:
      flat: the numbers, or others that their bytes are disguised as.
      rows: of the matrix.
      columns: of the matrix.
      dtype: of the numbers, that of `flat` if None.
    """
    dtype = np.dtype(dtype or flat.dtype)
    each = columns * dtype.itemsize // flat.dtype.itemsize
    before = (slice(None),) * flat.shape.index(max(flat.shape))

    def fetch(index: Index) -> np.ndarray:
        (first, end), _ = spans(index, (rows, columns))
        block = np.ascontiguousarray(flat.read((*before, slice(first * each, end * each))))
        return block.reshape(-1).view(dtype).reshape(end - first, columns)[:, index[1]]

    return LazyTensor((rows, columns), dtype, fetch)


def mapped(function: Callable[[np.ndarray], np.ndarray], tensor: LazyTensor, dtype: Any = None) -> LazyTensor:
    """Return `function(tensor)`, number by number, in its dtype or the one that the function returns."""
    return LazyTensor(tensor.shape, np.dtype(dtype or tensor.dtype), lambda index: function(tensor.read(index)))


def made(shape: Sequence[int], dtype: Any, whole: Callable[[], np.ndarray]) -> LazyTensor:
    """Return an array that is computed when it is read, always as a whole."""
    return LazyTensor(tuple(shape), np.dtype(dtype), lambda index: whole()[index])


def in_dtype(weight: QuantizedWeight | PermutedWeight, dtype: Any) -> QuantizedWeight | PermutedWeight:
    """Return the matrix with this dtype for what is materialised of it."""
    if isinstance(weight, PermutedWeight):
        return dataclasses.replace(weight, base=in_dtype(weight.base, dtype))
    return dataclasses.replace(weight, dtype_name=np.dtype(dtype).name)


def plain(weight: QuantizedWeight | PermutedWeight) -> QuantizedWeight:
    """Return the matrix with its rows as they are stored."""
    return weight.base if isinstance(weight, PermutedWeight) else weight
