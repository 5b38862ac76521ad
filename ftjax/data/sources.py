"""Where rows come from: files, folders, data set ids and generated tasks, each as rows by index.

A source is a size, a function that reads row `i`, and a function that says where row `i` stands. Files are indexed once and their rows
read when asked for (JSON Lines, Parquet), or parsed at once where the format has no row borders to find (JSON, CSV).
"""

from __future__ import annotations

import bisect
import csv
import functools
import gzip
import io
import itertools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ftjax import tree
from ftjax.data import tasks
from ftjax.data.rows import MAX_ROW_BYTES, RowError, as_row, decode, parse_json

Row = dict[str, Any]


class Source(NamedTuple):
    """Rows by index."""

    name: str
    size: int
    read: Callable[[int], Row]
    """`read(i) -> row`; raises `RowError` for a row that cannot be read."""
    where: Callable[[int], str]
    """`where(i)`: the file and line of row `i`."""


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
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not _suffix(path):
            source = _hub(path, base, name)
        else:
            raise ValueError(f"data: there is no file or folder {path!r}")
    source = _slice(source, start, stop)
    if not source.size:
        raise ValueError(f"data: {path} [{split}] has no rows")
    return source


def open_file(path: epath.Path) -> Source:
    """Return the rows of one file, by its suffix."""
    suffix = _suffix(path.name)
    if suffix not in _READERS:
        raise ValueError(f"data: cannot tell what kind of file {path} is; nearest: {tree.nearest(path.suffix or path.name, _READERS)}")
    return _READERS[suffix](path)


def json_lines(path: epath.Path) -> Source:
    """Return the rows of a file with one JSON object a line; empty lines are skipped, a BOM and CRLF are accepted."""
    data = _bytes(path)
    return _lines(str(path), data)


def json_file(path: epath.Path) -> Source:
    """Return the rows of a JSON list of objects, or of `{"data": [...]}`; JSON Lines under this suffix are read too."""
    data = _bytes(path)
    text = _text(data)
    opening = re.match(r'\s*(\{\s*"data"\s*:\s*)?\[', text)
    if not opening:
        if not text.lstrip().startswith("{"):
            raise RowError("expected a list of objects", where=f"{path}:1")
        return _lines(str(path), data)
    places = _list_items(text, opening.end() - 1, str(path), closed=not opening[1])
    lines = np.searchsorted(_newlines(text), [begin for begin, _ in places]) + 1

    def where(i: int) -> str:
        return f"{path}:{lines[i]}"

    return Source(str(path), len(places), lambda i: parse_json(text[slice(*places[i])], where=where(i)), where)


def csv_file(path: epath.Path, delimiter: str = ",") -> Source:
    """Return the rows of a CSV file with a header line; every column is a string."""
    text = _text(_bytes(path))
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    rows, lines = [], []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line = 1
        for fields in reader:
            if fields:
                rows.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise RowError(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from None
    finally:
        csv.field_size_limit(limit)
    header = rows.pop(0) if rows else []
    if len(set(header)) < len(header):
        raise RowError(f"a column name appears twice in {header}", where=f"{path}:1")

    def where(i: int) -> str:
        return f"{path}:{lines[i + 1]}"

    def read(i: int) -> Row:
        if len(rows[i]) != len(header):
            raise RowError(f"{len(rows[i])} fields under {len(header)} column names", where=where(i))
        return as_row(dict(zip(header, rows[i], strict=True)), where=where(i))

    return Source(str(path), len(rows), read, where)


def parquet_file(path: epath.Path) -> Source:
    """Return the rows of a Parquet file, a row group at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(_bytes(path)) if path.name.endswith(".gz") or "://" in str(path) else os.fspath(path))
    except pyarrow.ArrowException as error:
        raise RowError(f"not Parquet: {error}", where=str(path)) from None
    stops = list(itertools.accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
    group_rows = functools.lru_cache(maxsize=2)(lambda group: file.read_row_group(group))

    def where(i: int) -> str:
        return f"{path}: row {i + 1}"

    def read(i: int) -> Row:
        group = bisect.bisect_right(stops, i)
        first = stops[group] - file.metadata.row_group(group).num_rows
        try:
            return as_row(group_rows(group).slice(i - first, 1).to_pylist()[0], where=where(i))
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise RowError(str(error), where=where(i)) from None

    return Source(str(path), stops[-1] if stops else 0, read, where)


def text_file(path: epath.Path) -> Source:
    """Return the one row of a plain text file: the whole document, as the column `text`."""
    data = _bytes(path)

    def read(i: int) -> Row:
        return as_row({"text": _text(data).replace("\r\n", "\n")}, where=str(path))

    return Source(str(path), 1 if bytes(data[:4096]).strip() or len(data) > 4096 else 0, read, lambda i: str(path))


_READERS: dict[str, Callable[[epath.Path], Source]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": functools.partial(csv_file, delimiter="\t"),
    ".parquet": parquet_file,
    ".txt": text_file,
    ".md": text_file,
}


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


def _text(data: Any) -> str:
    """Return a whole file as text without its BOM; bytes that are not UTF-8 stay as surrogates, which `as_row` finds in their row."""
    return bytes(data).decode("utf-8-sig", "surrogateescape")


def _bytes(path: epath.Path) -> Any:
    """Return a file's bytes: mapped where it is local and plain, so that only the rows asked for are read."""
    if path.name.endswith(".gz"):
        try:
            return gzip.decompress(path.read_bytes())
        except (OSError, EOFError) as error:
            raise RowError(f"not gzip: {error}", where=str(path)) from None
    if "://" in str(path):
        return path.read_bytes()
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _lines(name: str, data: Any) -> Source:
    breaks = np.concatenate([[-1], _breaks(data), [len(data)]])
    starts, stops = breaks[:-1] + 1, breaks[1:]
    # Blank lines are no rows. Only short lines can be blank, so only those are read here.
    short = np.flatnonzero(stops - starts <= 64)
    blank = [i for i in short.tolist() if not bytes(data[starts[i] : stops[i]]).removeprefix(b"\xef\xbb\xbf").strip()]
    numbers = np.setdiff1d(np.arange(len(starts)), np.asarray(blank, np.int64))

    def where(i: int) -> str:
        return f"{name}:{numbers[i] + 1}"

    def read(i: int) -> Row:
        begin, end = int(starts[numbers[i]]), int(stops[numbers[i]])
        raw = bytes(data[begin : min(end, begin + MAX_ROW_BYTES + 1)])
        raw = raw.removeprefix(b"\xef\xbb\xbf") if begin == 0 else raw
        return parse_json(decode(raw, where=where(i)), where=where(i))

    return Source(name, len(numbers), read, where)


def _breaks(data: Any, chunk: int = 2**26) -> np.ndarray:
    """Return the positions of the newlines, a chunk at a time so that the comparison stays small."""
    if not len(data):
        return np.zeros(0, np.int64)
    raw = np.frombuffer(data, np.uint8)
    return np.concatenate([np.flatnonzero(raw[at : at + chunk] == 10) + at for at in range(0, len(raw), chunk)])


def _newlines(text: str) -> np.ndarray:
    return np.asarray([match.start() for match in re.finditer("\n", text)], np.int64)


def _list_items(text: str, at: int, name: str, *, closed: bool) -> list[tuple[int, int]]:
    """Return where each item of the list that opens at `at` begins and ends; if `closed`, nothing may follow the list."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    places: list[tuple[int, int]] = []

    def wrong(reason: str, position: int) -> RowError:
        return RowError(f"not JSON: {reason}", where=f"{name}:{text.count(chr(10), 0, position) + 1}")

    at = space.match(text, at + 1).end()
    while text[at : at + 1] != "]" or places:
        if text[at : at + 1] != "{":
            raise wrong("expected an object (is there a comma after the last?)", at)
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise wrong(error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise wrong("nested too deeply" if isinstance(error, RecursionError) else str(error), at) from None
        places.append((at, end))
        at = space.match(text, end).end()
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise wrong("expected ',' or ']'", at)
        at = space.match(text, at + 1).end()
    if closed and text[at + 1 :].strip():
        raise wrong("something follows the list", at + 1)
    return places


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    return suffix if suffix in _READERS else ""


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
        raise ValueError(f"data: {place} has no file that can be read; expected {', '.join(_READERS)}, perhaps with .gz")
    return join([open_file(path) for path in chosen], str(place))


def _walk(place: epath.Path) -> Iterator[epath.Path]:
    """Yield the files of a folder that hold rows, in the order of their names; what speaks of the data is not data."""
    for path in sorted(place.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.name.split(".")[0].upper() in _PAPERS:
            continue
        if path.is_dir():
            yield from _walk(path)
        elif _suffix(path.name):
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
