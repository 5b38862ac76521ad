"""One file as rows by index: JSON Lines, JSON, CSV, Parquet and plain text, each perhaps compressed.

JSON Lines and Parquet are indexed once and read row by row. JSON and CSV have no row borders to find without parsing, so they are parsed at
once, but a row that is wrong in itself (its keys, its encoding, its number of fields) is found when it is read, and alone.
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
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ftjax import tree
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


def open_file(path: epath.Path) -> Source:
    """Return the rows of one file, by its suffix."""
    suffix = suffix_of(path.name)
    if suffix not in READERS:
        raise ValueError(f"data: cannot tell what kind of file {path} is; nearest: {tree.nearest(path.suffix or path.name, READERS)}")
    return READERS[suffix](path)


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


READERS: dict[str, Callable[[epath.Path], Source]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": functools.partial(csv_file, delimiter="\t"),
    ".parquet": parquet_file,
    ".txt": text_file,
    ".md": text_file,
}


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


def suffix_of(name: str) -> str:
    """Return the suffix by which a file can be read, or nothing."""
    suffix = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    return suffix if suffix in READERS else ""
