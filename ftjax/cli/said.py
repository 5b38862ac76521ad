"""What a teacher said of the texts of a config, in one file: its k most likely tokens in every place that is learnt from.

A safetensors file: for each field of `FIELDS`, `FIELD/ids` int32 and `FIELD/logps` float32 `[places, k]`, the likeliest first. Its metadata
say which teacher that was, and the SHA-256 of the tokens and masks it read, in which data, template, tokenizer and cuts all show; so what
another teacher said, or what was said of other data, is never learnt from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from ftjax import data
from ftjax.cli import runtime
from ftjax.cli.run import Lessons
from ftjax.data.loader import once
from ftjax.types import Batch

FORMAT = "ftjax teacher 1"
FIELDS = ("sources", "eval_sources")
"""Of `config.data`."""
_TEACHER = ("name", "dtype", "quantize", "preset", "random")


class Said(NamedTuple):
    """Of some sequences."""

    ids: np.ndarray
    """int32 `[places, k]`."""
    logps: np.ndarray
    """float32 `[places, k]`."""


def ask(sequences: data.Sequences, look: Callable[[Batch], tuple[Any, Any]], *, rows: int, width: int) -> Said:
    """Return what a teacher says in every place of some sequences that counts.

    Args:
      sequences: each no longer than `width`.
      look: `batch -> (ids [rows, width, k], logps [rows, width, k])`, of `scoring.likeliest`.
      rows: of a batch, in which sequences share rows.
      width: tokens of a row.
    """
    places, ids, logps = _places(sequences), None, None
    for batch, at in once(sequences, rows=rows, width=width):
        counted = batch.loss_mask > 0
        at = places[at[counted]]
        found = [np.asarray(x)[counted] for x in look(batch)]
        if ids is None:
            ids, logps = (np.zeros((int(places.max()) + 1, x.shape[-1]), x.dtype) for x in found)
        ids[at], logps[at] = found
    return Said(ids, logps)


def write(path: Path, config, said: Mapping[str, tuple[data.Sequences, Said]], *, fingerprint: str) -> None:
    """Write what the teacher of a config said of the sequences of each field; the file appears when it is complete."""
    tensors = {f"{field}/{name}": array for field, (_, one) in said.items() for name, array in one._asdict().items()}
    about = {"format": FORMAT, "teacher": json.dumps(_teacher(config)), "parameters": fingerprint}
    about |= {f"{field}/sha256": sequences.sha256 for field, (sequences, _) in said.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, partial, metadata=about)
    os.replace(partial, path)


def told(config, lessons: Lessons) -> Lessons:
    """Return the lessons whose batches bring along what is in `config.teacher.file`, if one is named.

    Raises:
      ValueError: the file is none of these, is of another teacher or of other data, or a text is cut into rows of other contexts.
    """
    if not ("teacher" in config and config.teacher.file):
        return lessons
    if config.data.packing == "wrapped":
        raise ValueError(
            "teacher.file: data.packing='wrapped' cuts texts, and the teacher read them whole; set it to 'best_fit' or 'none'."
        )
    with _open(config.teacher.file) as file:
        about = file.metadata()
        if (theirs := json.loads(about["teacher"])) != (ours := _teacher(config)):
            changed = "; ".join(f"{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in ours if theirs.get(name) != ours[name])
            raise ValueError(f"teacher.file: {config.teacher.file} holds what another teacher said ({changed}).")
        loaders = [_knowing(loader, field, file, config.teacher.file) for loader, field in zip(lessons[1:], FIELDS, strict=True)]
    return Lessons(lessons.encoder, *loaders)


def count(path: str) -> int:
    """Return k."""
    with _open(path) as file:
        return file.get_slice(f"{FIELDS[0]}/ids").get_shape()[1]


def _knowing(loader: data.Loader | None, field: str, file: Any, path: str) -> data.Loader | None:
    if loader is None:
        return None
    if file.metadata().get(f"{field}/sha256") != loader.sequences.sha256:
        raise ValueError(
            f"teacher.file: what {path} holds is not of data.{field} as it is now: rows, template, tokenizer or max_tokens are others. "
            "Ask the teacher again with `ftjax teach`."
        )
    places = _places(loader.sequences)
    known = {name: file.get_tensor(f"{field}/{name}") for name in Said._fields}
    spread = {f"teacher_{name}": np.where(places[:, None] < 0, 0, array[places]).astype(array.dtype) for name, array in known.items()}
    return loader.knowing(**spread)


def _places(sequences: data.Sequences) -> np.ndarray:
    """Return the number `[all tokens]` of each token that counts, -1 for the others; the first of a sequence has nothing before it."""
    counted = sequences.loss_mask > 0
    counted[sequences.starts[:-1]] = False
    return np.where(counted, np.cumsum(counted) - 1, -1)


def _open(path: str) -> Any:
    local = runtime.local_path("config.teacher.file", path)
    try:
        file = safetensors.safe_open(local, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"teacher.file: {path} cannot be read ({error}); `ftjax teach` writes it.") from error
    if (file.metadata() or {}).get("format") != FORMAT:
        raise ValueError(f"teacher.file: {path} is not what `ftjax teach` writes.")
    return file


def _teacher(config) -> dict[str, Any]:
    return {name: config.teacher[name] for name in _TEACHER}
