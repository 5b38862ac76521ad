"""Which sequences share a row, and which rows share a batch: plans, made from lengths alone.

A plan holds indices only, so it is cheap to make again: it is a function of (lengths in this epoch's order, settings).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from ftjax import tree

PACKINGS = ("best_fit", "none", "wrapped")


class Rows(NamedTuple):
    """Rows as runs of pieces: row `r` holds the pieces `starts[r]` to `starts[r + 1]`.

    A piece `(sequence, begin, end)` is the tokens `begin` to `end` of a sequence.
    """

    pieces: np.ndarray
    """int `[pieces, 3]`."""
    starts: np.ndarray
    """int `[rows + 1]`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """An epoch: `batches[s]` lists the rows of step `s` (-1 is an empty row) and `widths[s]` is its number of tokens a row."""

    rows: Rows
    batches: np.ndarray
    """int `[steps, batch_size]`."""
    widths: np.ndarray
    """int `[steps]`."""


def make_plan(
    lengths: np.ndarray,
    *,
    batch_size: int,
    max_tokens: int,
    packing: str,
    generator: np.random.Generator,
    buckets: int = 4,
    shuffle: bool = True,
) -> Plan:
    """Return the plan of an epoch whose sequences have these `lengths [n]`, in this order.

    Args:
      lengths: tokens of each sequence; what is longer than `max_tokens` (only documents are) is cut into several pieces.
      batch_size: rows in a batch.
      max_tokens: tokens in a row.
      packing: "best_fit" (rows of whole sequences), "none" (one sequence a row, padded) or "wrapped" (the stream of all tokens, cut).
      generator: shuffles rows or batches.
      buckets: with "none", batches have at most so many different widths.
      shuffle: rows and batches in random order; otherwise as they come.
    """
    if packing not in PACKINGS:
        raise ValueError(f"data: packing is {packing!r}; nearest: {tree.nearest(packing, PACKINGS)}")
    if packing == "wrapped":
        rows = wrapped(lengths, max_tokens)
    else:
        pieces = split(lengths, max_tokens)
        sizes = pieces[:, 2] - pieces[:, 1]
        if packing == "none":
            batches, tokens = padded(sizes, batch_size=batch_size, max_tokens=max_tokens, buckets=buckets)
            order = generator.permutation(len(batches)) if shuffle else np.arange(len(batches))
            return Plan(Rows(pieces, np.arange(len(pieces) + 1)), batches[order], tokens[order])
        members, starts = best_fit(sizes, max_tokens)
        rows = Rows(pieces[members], starts)
    count = len(rows.starts) - 1
    batches = _in_batches(generator.permutation(count) if shuffle else np.arange(count), batch_size)
    return Plan(rows, batches, np.full(len(batches), max_tokens, np.int64))


def split(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the pieces `[pieces, 3]` of sequences cut every `capacity` tokens; a sequence that fits is one piece."""
    lengths = np.asarray(lengths, np.int64)
    counts = -(-lengths // capacity)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    begins = (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    return np.stack([sequence, begins, np.minimum(begins + capacity, lengths[sequence])], axis=1)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `(members [n], starts [rows + 1])`: rows filled by best fit, the longest first, each going where it leaves the least space.

    Best-fit decreasing never needs more than 11/9 of the fewest rows possible plus one (Johnson et al. 1974); on real lengths it wastes
    a percent or less. Free spaces are a bitset, so a sequence finds its row in a shift: 100,000 take a fraction of a second.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"data: lengths from {lengths.min()} to {lengths.max()} do not fit rows of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where some row has exactly s tokens free
    row_of = np.empty(len(lengths), np.int64)
    count = 0
    for at, need in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row, count = capacity, count, count + 1
        row_of[at] = row
        with_space[space - need].append(row)
        spaces |= 1 << (space - need)
    members = order[np.argsort(row_of[order], kind="stable")]
    return members, np.searchsorted(row_of[members], np.arange(count + 1))


def wrapped(lengths: np.ndarray, capacity: int) -> Rows:
    """Return the stream of all tokens cut into rows; a sequence that crosses a border becomes two pieces."""
    lengths = np.asarray(lengths, np.int64)
    stops = np.cumsum(lengths)
    total = int(stops[-1]) if len(stops) else 0
    cuts = np.union1d(np.concatenate([[0], stops]), np.arange(0, total, capacity))
    begins, ends = cuts[:-1], cuts[1:]
    sequence = np.searchsorted(stops, begins, side="right")
    offset = (stops - lengths)[sequence] if len(begins) else begins
    pieces = np.stack([sequence, begins - offset, ends - offset], axis=1).astype(np.int64)
    return Rows(pieces, np.searchsorted(begins, np.arange(-(-total // capacity) + 1) * capacity))


def widths(max_tokens: int, buckets: int = 4) -> list[int]:
    """Return the widths of padded batches: `max_tokens` and its halves, rounded up to a multiple of 8, ascending."""
    return sorted({min(max_tokens, -(-max_tokens // 2**k) + 7 & ~7) for k in range(buckets)})


def padded(lengths: np.ndarray, *, batch_size: int, max_tokens: int, buckets: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return `(batches [steps, batch_size], widths [steps])` of one sequence a row, those of like length together.

    What is left over in a bucket moves up to the next, so only one batch has empty rows (-1).
    """
    bounds = np.asarray(widths(max_tokens, buckets))
    bucket = np.searchsorted(bounds, lengths)
    batches, tokens, left = [], [], np.zeros(0, np.int64)
    for at, width in enumerate(bounds):
        waiting = np.concatenate([left, np.flatnonzero(bucket == at)])
        full = len(waiting) - len(waiting) % batch_size
        batches.append(waiting[:full].reshape(-1, batch_size))
        tokens += [width] * len(batches[-1])
        left = waiting[full:]
    if len(left):
        batches.append(_in_batches(left, batch_size))
        tokens.append(bounds[bucket[left].max()])
    return np.concatenate(batches), np.asarray(tokens, np.int64)


def _in_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    return np.concatenate([rows, np.full(-len(rows) % batch_size, -1, np.int64)]).reshape(-1, batch_size)
