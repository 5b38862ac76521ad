"""A row of a data set, and everything that can be wrong with it, said with file, line, column and reason."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_ROW_BYTES = 64 * 2**20
"""A longer line is a broken file (a missing newline, a binary), not an example."""


class RowError(ValueError):
    """A row that cannot be used: where it stands and why."""

    def __init__(self, reason: str, *, where: str = "", column: str = ""):
        self.reason, self.where, self.column = reason, where, column
        super().__init__(": ".join(part for part in (where, f"column {column!r}" if column else "", reason) if part))

    def at(self, where: str) -> RowError:
        """Return the same error with its place filled in, if it had none."""
        return RowError(self.reason, where=self.where or where, column=self.column)


def decode(raw: bytes, *, where: str) -> str:
    """Return `raw` as text; broken UTF-8 is an error that names the byte."""
    if len(raw) > MAX_ROW_BYTES:
        raise RowError(f"{len(raw):,} bytes in one row, more than the limit of {MAX_ROW_BYTES:,}; is a newline missing?", where=where)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start} of the row ({raw[error.start : error.start + 4]!r})", where=where) from None


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """Return one JSON object, strictly: no duplicate keys, no NaN or Infinity, no lone surrogates.

    Raises:
      RowError: with the reason and the column of the text.
    """
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise RowError("nested too deeply", where=where) from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos}", where=where) from None
    except ValueError as error:
        raise RowError(f"not JSON: {error}", where=where) from None
    return as_row(row, where=where)


def as_row(row: Any, *, where: str) -> dict[str, Any]:
    """Return `row` if it is an object whose text can be encoded."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object with named columns, got {kind(row)}", where=where)
    try:
        _check_text(row)
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        # Files that are decoded whole keep each byte that is not UTF-8 as a surrogate, so that only its row is lost.
        reason = f"not UTF-8 (byte {code - 0xDC00:#04x})" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate \\u{code:04x} is not text"
        raise RowError(reason, where=where) from None
    except RecursionError:
        raise RowError("nested too deeply", where=where) from None
    return row


def kind(value: Any) -> str:
    """Return the JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _check_text(value: Any) -> None:
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item)
