"""A Hugging Face folder as a checkpoint: its config, and its safetensors as lazy tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from ftjax.hf import checksums, names, quantized
from ftjax.hf.lazy import Index, LazyTensor
from ftjax.hf.write import INDEX

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


class Checkpoint(NamedTuple):
    """A model on disk, whatever its format."""

    path: Path
    config: dict[str, Any]
    """As in a Hugging Face `config.json`."""
    tensors: dict[str, LazyTensor]
    """By Hugging Face name, in Hugging Face's layout."""


def read(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder with `config.json` and one or many `.safetensors` files.

    Of a quantised folder it is the dense model that it stands for (see `ftjax.hf.quantized.gathered`).

    Raises:
      FileNotFoundError: there is no config or no safetensors file.
      ValueError: a file is truncated or malformed, a tensor has an unknown dtype, or the index and the files disagree; a quantised
        matrix is not what its method says it is.
    """
    config, tensors = read_json(folder / "config.json"), _all_tensors(folder)
    if (folder / checksums.FILE).is_file():
        tensors = checksums.verified(tensors, read_json(folder / checksums.FILE), folder / checksums.FILE)
    old = [quantized.OLD_CONFIGS[file](read_json(folder / file)) for file in quantized.OLD_CONFIGS if (folder / file).is_file()]
    tensors = {names.canonical(name): tensor for name, tensor in tensors.items()}
    return Checkpoint(folder, *quantized.gathered(folder, config, tensors, old=old[0] if old else None))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; the error of a malformed file names it."""
    if not path.is_file():
        raise FileNotFoundError(f"hf: {path} does not exist; a Hugging Face folder holds {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"hf: {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"hf: {path} holds a {type(value).__name__} where a JSON object is expected")
    return value


def _all_tensors(folder: Path) -> dict[str, LazyTensor]:
    if (folder / INDEX).is_file():
        return _sharded(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {', '.join(pickled)} are pickles, which ftjax does not open: convert them to safetensors" if pickled else ""
        raise FileNotFoundError(f"hf: no .safetensors file in {folder}{hint}")
    if len(files) > 1:
        raise ValueError(f"hf: {folder} holds {[f.name for f in files]} and no {INDEX} that says which tensor is where")
    return file_tensors(files[0])


def _sharded(folder: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"hf: {folder / INDEX} has no 'weight_map' from tensor names to file names")
    inside = {file for file in weight_map.values() if Path(file).name == file}
    outside = sorted(set(weight_map.values()) - inside)
    missing = sorted(file for file in inside if not (folder / file).is_file())
    if outside or missing:
        raise ValueError(f"hf: {folder / INDEX} names files that are not in the folder: {outside + missing}")
    shards = {file: file_tensors(folder / file) for file in sorted(inside)}
    absent = sorted(name for name, file in weight_map.items() if name not in shards[file])
    if absent:
        raise ValueError(f"hf: {folder / INDEX} promises tensors that its files do not hold: {absent}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def file_tensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one safetensors file by name; the file stays memory-mapped while any of them is alive."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
        names_in_file = file.keys()
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"hf: {path} is not a complete safetensors file ({error}); download or copy it again") from error
    return {name: _tensor(path, file, name) for name in names_in_file}


def _tensor(path: Path, file: Any, name: str) -> LazyTensor:
    view = file.get_slice(name)
    if view.get_dtype() not in _DTYPES:
        raise ValueError(f"hf: {path}: tensor {name!r} has dtype {view.get_dtype()}; expected one of {sorted(_DTYPES)}")

    def fetch(index: Index) -> np.ndarray:
        return view[index] if index and 0 not in view.get_shape() else file.get_tensor(name)[index]

    return LazyTensor(tuple(view.get_shape()), _DTYPES[view.get_dtype()], fetch)
