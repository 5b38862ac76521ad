"""Where rows come from: files, folders, data set ids and generated tasks, each as rows by index."""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from ftjax import tree
from ftjax.data import tasks
from ftjax.data.files import READERS, Row, Source, open_file, suffix_of
from ftjax.data.rows import as_row


def open_source(path: str, *, split: str = "train", name: str | None = None) -> Source:
    """Return the rows of a file, a folder, a data set of the hub, or a generated task.

    Args:
      path: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, `.md`, each perhaps with `.gz`); a folder of such files or one
        that `datasets` saved; `tasks:<name>`; or an id for `datasets.load_dataset`. Remote files (`gs://`) too.
      split: the part to read; of a folder, the files with this word in their names if there are any. May end in a slice by row
        or by percent: `train[:90%]`, `train[90%:]`, `test[:200]`. A single file is all one split.
      name: the configuration of a hub data set.

    Raises:
      ValueError: nothing is there, a file is empty or of an unknown kind, or the slice is empty.
    """
    base, start, stop = _sliced(split)
    if path.startswith("tasks:"):
        source = _task(path.removeprefix("tasks:"), base)
    else:
        place = epath.Path(os.path.expanduser(path))
        if place.is_dir():
            source = _folder(place, base)
        elif place.exists():
            source = open_file(place)
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not suffix_of(path):
            source = _hub(path, base, name)
        else:
            raise ValueError(f"data: there is no file or folder {path!r}")
    source = _slice(source, start, stop)
    if not source.size:
        raise ValueError(f"data: {path} [{split}] has no rows")
    return source


def join(sources: Sequence[Source], name: str) -> Source:
    """Return the rows of several sources, one after the other."""
    stops = list(itertools.accumulate(source.size for source in sources))

    def at(i: int) -> tuple[Source, int]:
        which = bisect.bisect_right(stops, i)
        return sources[which], i - (stops[which] - sources[which].size)

    def read(i: int) -> Row:
        source, row = at(i)
        return source.read(row)

    def where(i: int) -> str:
        source, row = at(i)
        return source.where(row)

    return Source(name, stops[-1] if stops else 0, read, where)


def _sliced(split: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"([\w.+-]+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match:
        raise ValueError(f"data: split {split!r} is not like 'train', 'train[:90%]' or 'test[100:200]'")
    return match[1], match[2] or "", match[3] or ""


def _slice(source: Source, start: str, stop: str) -> Source:
    if not start and not stop:
        return source

    def row(bound: str, default: int) -> int:
        if not bound:
            return default
        return min(source.size, int(bound[:-1]) * source.size // 100 if bound.endswith("%") else int(bound))

    first, last = row(start, 0), row(stop, source.size)
    return Source(source.name, max(0, last - first), lambda i: source.read(first + i), lambda i: source.where(first + i))


def _folder(place: epath.Path, split: str) -> Source:
    names = sorted(path.name for path in place.iterdir())
    if {"state.json", "dataset_dict.json"} & set(names):
        import datasets

        saved = datasets.load_from_disk(os.fspath(place))
        return _arrow(saved[_known(split, saved)] if isinstance(saved, dict) else saved, str(place))
    files = list(_walk(place))
    words = {word: [path for path in files if word in re.split(r"[^a-z0-9]+", path.name.lower())] for word in _SPLITS.get(split, (split,))}
    chosen = [path for found in words.values() for path in found]
    if not chosen and split != "train":
        raise ValueError(f"data: no file in {place} has {split!r} in its name; there are {', '.join(names[:20]) or 'no files'}")
    if not chosen:
        others = {word for key, group in _SPLITS.items() if key != "train" for word in group}
        chosen = [path for path in files if not others & set(re.split(r"[^a-z0-9]+", path.name.lower()))]
    if not chosen:
        raise ValueError(f"data: {place} has no file that can be read; expected {', '.join(READERS)}, perhaps with .gz")
    return join([open_file(path) for path in chosen], str(place))


def _walk(place: epath.Path) -> Iterator[epath.Path]:
    """Yield the files of a folder that hold rows, in the order of their names; what speaks of the data is not data."""
    for path in sorted(place.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.name.split(".")[0].upper() in _PAPERS:
            continue
        if path.is_dir():
            yield from _walk(path)
        elif suffix_of(path.name):
            yield path


_PAPERS = ("README", "LICENSE", "NOTICE", "CHANGELOG", "CITATION")
_SPLITS = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("validation", "valid", "dev", "eval")}


def _hub(path: str, split: str, name: str | None) -> Source:
    import datasets

    try:
        return _arrow(datasets.load_dataset(path, name, split=split), path)
    except Exception as error:  # `datasets` raises many kinds; the user needs all of them with this one's name
        raise ValueError(f"data: {path!r} is no file or folder here, and `datasets` could not load it: {error}") from error


def _arrow(dataset: Any, name: str) -> Source:
    return Source(name, len(dataset), lambda i: as_row(dataset[i], where=f"{name}: row {i + 1}"), lambda i: f"{name}: row {i + 1}")


def _known(split: str, splits: Any) -> str:
    if split not in splits:
        raise ValueError(f"data: there is no split {split!r}; nearest: {tree.nearest(split, splits)}")
    return split


def _task(name: str, split: str) -> Source:
    size = tasks.SIZES.get(split)
    if size is None:
        raise ValueError(f"data: generated tasks have no split {split!r}; nearest: {tree.nearest(split, tasks.SIZES)}")
    make = tasks.get(name)
    return Source(f"tasks:{name}", size, lambda i: make(i, split=split), lambda i: f"tasks:{name}[{split}] row {i}")
