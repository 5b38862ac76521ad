"""Prompts side by side in few rows, so that reading them wastes neither columns nor compiled programs; what all begin with stands once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.beginnings import shared
from ftjax.rollout.prompts import bucket
from ftjax.types import BRANCH

LEAST_STEM = 16
"""A shorter beginning is not worth standing apart."""
MOST = 2**31 // BRANCH - 1
"""Prompts that are read together: as many as can branch off one stem."""


class Place(NamedTuple):
    """Where a prompt lies, or what comes after the stem of its row."""

    prompt: int
    """Its index."""
    row: int
    start: int


def stem(prompts: Sequence[np.ndarray]) -> int:
    """Return how many tokens several prompts begin with alike, each having one more at least; 0 for less than `LEAST_STEM`.

    >>> [stem([np.arange(20), np.arange(n)]) for n in (8, 18, 30)]
    [0, 17, 19]
    """
    size = min(map(len, prompts)) - 1
    if len(prompts) < 2 or size < LEAST_STEM:
        return 0
    size = shared(prompts, size)
    return size if size >= LEAST_STEM else 0


def width(lengths: Sequence[int], *, rows: int, limit: int, stem: int = 0) -> int:
    """Return the columns of the rows that prompts are packed into: the limit, a quarter of it, … while they fit; a bucket beyond it.

    The lengths are without the stem, which every row begins with. Where it takes most of the limit, this is for what comes after it.

    >>> [width(lengths, rows=1, limit=512) for lengths in ([300, 300], [100], [20, 9], [600])]
    [512, 128, 32, 768]
    >>> width([20] * 64, rows=1, limit=512, stem=490)
    1024
    """
    longest = stem + max(lengths)
    needed = max(longest, stem - (-sum(lengths) // rows))
    if longest > limit or stem > limit // 2:
        return bucket(max(longest, min(needed, stem + limit)))
    columns = limit
    while needed <= columns // 4 and columns // 4 >= 16:
        columns //= 4
    return columns


def place(lengths: Sequence[int], adapters: Sequence[int], *, rows: int, columns: int, stem: int = 0) -> list[Place]:
    """Return places for prompts: each in the first row that has room and prompts of its adapter alone, or in none.

    The lengths are without the stem, which every row begins with.

    >>> place([5, 4, 3], [0, 0, 0], rows=1, columns=8)
    [Place(prompt=0, row=0, start=0), Place(prompt=2, row=0, start=5)]
    """
    used, owners, places = [stem] * rows, [None] * rows, []
    for prompt, (length, adapter) in enumerate(zip(lengths, adapters, strict=True)):
        fitting = [row for row in range(rows) if used[row] + length <= columns and owners[row] in (None, adapter)]
        if fitting:
            row = fitting[0]
            places.append(Place(prompt, row, used[row]))
            used[row], owners[row] = used[row] + length, adapter
        if min(used) == columns or len(places) == MOST:
            break
    return places


def packed(
    prompts: Sequence[np.ndarray], places: Sequence[Place], *, rows: int, columns: int, stem: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(tokens, positions, segment_ids)`, int32 `[rows, columns]` each, of prompts at their places.

    With a stem each row begins with it, and what else a prompt has branches off it (`types.BRANCH`).
    """
    tokens, positions, segment_ids = (np.zeros((rows, columns), np.int32) for _ in range(3))
    for at, (index, row, start) in enumerate(places, 1):
        prompt, own = prompts[index], slice(start, start + len(prompts[index]) - stem)
        tokens[row, :stem], positions[row, :stem], segment_ids[row, :stem] = prompt[:stem], np.arange(stem), 1
        tokens[row, own], positions[row, own] = prompt[stem:], np.arange(stem, len(prompt))
        segment_ids[row, own] = 1 + at * BRANCH if stem else at
    return tokens, positions, segment_ids
