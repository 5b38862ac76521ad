"""Prompts side by side in few rows, so that reading them wastes neither columns nor compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.rollout.prompts import bucket


class Place(NamedTuple):
    """Where a prompt lies."""

    prompt: int
    """Its index."""
    row: int
    start: int


def width(lengths: Sequence[int], *, rows: int, limit: int) -> int:
    """Return the columns of the rows that prompts are packed into: the limit, a quarter of it, … while they fit; a bucket beyond it.

    >>> [width(lengths, rows=1, limit=512) for lengths in ([300, 300], [100], [20, 9], [600])]
    [512, 128, 32, 768]
    """
    needed = max(max(lengths), -(-sum(lengths) // rows))
    if max(lengths) > limit:
        return bucket(max(lengths))
    columns = limit
    while needed <= columns // 4 and columns // 4 >= 16:
        columns //= 4
    return columns


def place(lengths: Sequence[int], adapters: Sequence[int], *, rows: int, columns: int) -> list[Place]:
    """Return places for prompts: each in the first row that has room and prompts of its adapter alone, or in none.

    >>> place([5, 4, 3], [0, 0, 0], rows=1, columns=8)
    [Place(prompt=0, row=0, start=0), Place(prompt=2, row=0, start=5)]
    """
    used, owners, places = [0] * rows, [None] * rows, []
    for prompt, (length, adapter) in enumerate(zip(lengths, adapters, strict=True)):
        fitting = [row for row in range(rows) if used[row] + length <= columns and owners[row] in (None, adapter)]
        if fitting:
            row = fitting[0]
            places.append(Place(prompt, row, used[row]))
            used[row], owners[row] = used[row] + length, adapter
        if min(used) == columns:
            break
    return places


def packed(prompts: Sequence[np.ndarray], places: Sequence[Place], *, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(tokens, positions, segment_ids)`, int32 `[rows, columns]` each, of prompts at their places."""
    tokens, positions, segment_ids = (np.zeros((rows, columns), np.int32) for _ in range(3))
    for at, (prompt, row, start) in enumerate(places, 1):
        here = row, slice(start, start + len(prompts[prompt]))
        tokens[here], positions[here], segment_ids[here] = prompts[prompt], np.arange(len(prompts[prompt])), at
    return tokens, positions, segment_ids
