"""Writing: safetensors that are streamed tensor by tensor, and folders that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
"""The size of one file of weights, unless a single tensor is larger."""
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int8": "I8", "uint8": "U8"}


class Entry(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
      FileExistsError: `target` exists and is not an empty folder.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"hf: {target} exists already: name a new folder, or remove it first")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as Hugging Face does, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer and its chat template in a form that transformers 4 reads as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_adapter(
    folder: Path, config: tuple[str, Mapping[str, Any]], arrays: tuple[str, Mapping[str, np.ndarray]], tokenizer: Any = None
) -> Path:
    """Write a new folder of a JSON object, a safetensors file, each with its name, and a tokenizer if there is one; return the folder."""
    with new_folder(folder) as temporary:
        write_json(temporary / config[0], config[1])
        write_safetensors(temporary / arrays[0], [Entry(n, x.dtype, x.shape) for n, x in arrays[1].items()], arrays[1].values())
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer)
    return folder


def write_safetensors(path: Path, entries: Iterable[Entry], arrays: Iterable[np.ndarray]) -> None:
    """Write a safetensors file, taking the arrays one at a time in the order of the entries; only one is in memory."""
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _CODES[entry.dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, array in zip(entries, arrays, strict=True):
            assert array.shape == entry.shape and array.dtype == entry.dtype, f"{entry} came as {array.dtype} {array.shape}"
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write_shards(folder: Path, entries: Iterable[Entry], arrays: Iterable[np.ndarray], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model's tensors as Hugging Face does: one file, or several and an index that says which tensor is where."""
    shards, arrays = _shards(entries, shard_bytes), iter(arrays)
    many = len(shards) > 1
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, (next(arrays) for _ in shard))
    if many:
        weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for shard in shards for entry in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
