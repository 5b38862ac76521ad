"""The GGUF container: a header of plain values, and packed tensors that stay in the file.

`gguf.GGUFReader` makes several numpy arrays for every string of the vocabulary, which takes seconds and hundreds of megabytes; this reads
the same header in a tenth of a second, and checks every length against the file before it trusts it. The block types are `gguf`'s.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_MAX_DEPTH = 4
_MAX_AXES = 4


class Packed(NamedTuple):
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]
    """Of the values, in numpy's order: `[o, i]` for a matrix."""
    kind: gguf.GGMLQuantizationType
    rows: np.ndarray
    """uint8 `[*shape[:-1], bytes of a row]`, memory-mapped. A row is a whole number of blocks, so rows can be moved while packed."""


class File(NamedTuple):
    """A GGUF file, opened."""

    metadata: dict[str, Any]
    tensors: dict[str, Packed]


def open_file(path: Path) -> File:
    """Read the header of a GGUF file and map its tensors.

    Raises:
      ValueError: the file is not GGUF version 2 or 3, is malformed, or is shorter than its header says.
    """
    try:
        return _read(np.memmap(path, np.uint8, mode="r"))
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"gguf: {path} is not a complete GGUF file ({error}); download or copy it again") from error


def _read(data: np.ndarray) -> File:
    cursor = _Cursor(data)
    if cursor.take(4) != _MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} where 2 or 3 is expected")
    num_tensors, num_values = cursor.count(), cursor.count()
    metadata = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(num_values)}
    infos = [(cursor.string(), cursor.shape(), cursor.number("I"), cursor.number("Q")) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return File(metadata, {name: _packed(data, name, shape, kind, start + offset) for name, shape, kind, offset in infos})


def _packed(data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, start: int) -> Packed:
    kind = gguf.GGMLQuantizationType(kind)
    *outer, _ = row_shape = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    num_bytes = math.prod(row_shape)
    if start + num_bytes > data.size:
        raise ValueError(f"tensor {name!r} ends at byte {start + num_bytes} of {data.size}")
    return Packed(shape, kind, data[start : start + num_bytes].reshape(row_shape))


class _Cursor:
    """A position in the header that never leaves the file."""

    def __init__(self, data: np.ndarray):
        self._data = memoryview(data)
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._data):
            raise ValueError(f"the header ends at byte {len(self._data)}, inside a value")
        chunk, self.position = bytes(self._data[self.position : end]), end
        return chunk

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self) -> int:
        """Return a number of things that take at least a byte each."""
        count = self.number("Q")
        if count > len(self._data) - self.position:
            raise ValueError(f"a count of {count} in a file of {len(self._data)} bytes")
        return count

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise ValueError(f"a value of unknown type {kind}")
        inner, count = self.number("I"), self.count()
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        return self.strings(count) if inner == _STRING else [self.value(inner, depth + 1) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """Return `count` strings: a vocabulary, so this loop is written to be fast."""
        found, position, end = [], self.position, len(self._data)
        for _ in range(count):
            (size,) = _LENGTH.unpack_from(self._data, position)
            position += _LENGTH.size + size
            if position > end:
                raise ValueError(f"the header ends at byte {end}, inside a string")
            found.append(str(self._data[position - size : position], "utf-8"))
        self.position = position
        return found

    def shape(self) -> tuple[int, ...]:
        num_axes = self.number("I")
        if not 1 <= num_axes <= _MAX_AXES:
            raise ValueError(f"a tensor of {num_axes} axes")
        return tuple(self.number("Q") for _ in range(num_axes))[::-1]
