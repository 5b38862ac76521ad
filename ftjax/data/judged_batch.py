"""Items as a batch: a row for each response, padded to one width, or several items in a row; with what is known of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.corpus import Sequences
from ftjax.types import BRANCH, Batch


class _Row(NamedTuple):
    tokens: np.ndarray
    loss_mask: np.ndarray
    known: Mapping[str, np.ndarray]
    """What else is known of each token."""


def judged_batch(
    sequences: Sequences,
    items: np.ndarray,
    mine: slice,
    responses: int,
    numbers: Mapping[str, np.ndarray],
    *,
    width: int,
    mismatched: bool = False,
) -> Batch:
    """Return the batch of some items: `[rows, responses, width]`, or `[rows, width]` where an item has one response.

    Args:
      sequences: item `i` has `responses` of them, from `i · responses` on.
      items: those of the global batch; -1 is an empty row.
      mine: the rows of it that are returned.
      responses: of an item.
      numbers: what is known of each item, by the field of `Batch`; 0 in an empty row.
      width: tokens of a row.
      mismatched: add each prompt with the response of the next item of the global batch.
    """
    local = items[mine]
    rows = [sequences_row(sequences, item * responses + at) if item >= 0 else None for item in local for at in range(responses)]
    batch = padded(rows, width, (len(local), responses) if responses > 1 else (len(local),), names=sequences.known)
    known = {name: np.where(local < 0, 0, values[local]).astype(np.float32) for name, values in numbers.items()}
    batch = dataclasses.replace(batch, **known)
    if not mismatched:
        return batch
    others = _next_of(items)[mine]
    crossed = [_crossed(sequences, int(item), int(other), width) if item >= 0 else None for item, other in zip(local, others, strict=True)]
    return dataclasses.replace(batch, mismatched=padded(crossed, width, (len(local),)))


class Room(NamedTuple):
    """What a packed row has room for, the same in every batch, so that all run one program."""

    items: int
    tokens: int
    """Of a response, from its first trained token on."""


def common(sequences: Sequences, responses: int) -> np.ndarray:
    """Return int64 `[items]`: with how many untrained tokens all responses of an item begin, their prompt."""
    found = []
    for item in range(len(sequences.lengths) // responses):
        rows = [sequences_row(sequences, item * responses + at) for at in range(responses)]
        size = min(int(np.argmax(row.loss_mask)) for row in rows)
        same = np.all([row.tokens[:size] == rows[0].tokens[:size] for row in rows], axis=0)
        found.append(size if same.all() else int(np.argmin(same)))
    return np.asarray(found, np.int64)


def packed_batch(
    sequences: Sequences,
    rows: Sequence[Sequence[int]],
    responses: int,
    numbers: Mapping[str, np.ndarray],
    *,
    width: int,
    room: Room,
    stems: np.ndarray,
) -> Batch:
    """Return the batch `[rows, width]` of several items a row, with `places`.

    An item is its stem, the first tokens of all its responses, and after it each response without them, as a branch (`types.BRANCH`).

    Args:
      sequences: as in `judged_batch`.
      rows: the items of each row.
      responses: of an item.
      numbers: what is known of each item; in the batch `[rows, items]`.
      width: tokens of a row.
      room: at least what the fullest row of the run needs.
      stems: int `[items]`: tokens of the stem of each item; 0 where every response has a prompt of its own.
    """
    tokens, positions, segment_ids = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    loss_mask = np.zeros((len(rows), width), np.float32)
    places = np.full((len(rows), room.items, responses, room.tokens), -1, np.int32)
    known = {name: np.zeros((len(rows), room.items), np.float32) for name in numbers}
    of_tokens = {name: np.zeros((len(rows), width), np.float32) for name in sequences.known}
    for at, items in enumerate(rows):
        column = 0
        for n, item in enumerate(items):
            stem = int(stems[item])
            for response in range(responses):
                row = sequences_row(sequences, item * responses + response)
                if response == 0:
                    where = slice(column, column + stem)
                    tokens[at, where], positions[at, where], segment_ids[at, where] = row.tokens[:stem], np.arange(stem), n + 1
                    column += stem
                size, first = len(row.tokens) - stem, int(np.argmax(row.loss_mask)) - stem
                where = slice(column, column + size)
                tokens[at, where], loss_mask[at, where] = row.tokens[stem:], row.loss_mask[stem:]
                for name, values in row.known.items():
                    of_tokens[name][at, where] = values[stem:]
                loss_mask[at, column] = 0
                positions[at, where], segment_ids[at, where] = np.arange(stem, stem + size), n + 1 + (response + 1) * BRANCH
                places[at, n, response, : size - first] = np.arange(column + first, column + size)
                column += size
            for name, values in numbers.items():
                known[name][at, n] = values[item]
    return Batch(tokens, loss_mask, positions, segment_ids, places=places, **known, **of_tokens)


def sequences_row(sequences: Sequences, index: int) -> _Row:
    """Return one sequence."""
    where = slice(int(sequences.starts[index]), int(sequences.starts[index + 1]))
    known = {name: values[where] for name, values in sequences.known.items()}
    return _Row(sequences.tokens[where], sequences.loss_mask[where], known)


def padded(rows: Iterable[_Row | None], width: int, shape: tuple[int, ...], *, names: Iterable[str] = ()) -> Batch:
    """Return rows `[*shape, width]`, each one document from the left; None is an empty one, and `names` is what is known of tokens."""
    rows = list(rows)
    tokens, positions, segment_ids = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    loss_mask = np.zeros((len(rows), width), np.float32)
    known = {name: np.zeros((len(rows), width), np.float32) for name in names}
    for at, row in enumerate(rows):
        if row is not None:
            size = len(row.tokens)
            tokens[at, :size], loss_mask[at, :size] = row.tokens, row.loss_mask
            for name, values in row.known.items():
                known[name][at, :size] = values
            positions[at, :size], segment_ids[at, :size] = np.arange(size), 1
    loss_mask[:, :1] = 0  # the first token has nothing before it
    fields = {"tokens": tokens, "loss_mask": loss_mask, "positions": positions, "segment_ids": segment_ids, **known}
    return Batch(**{name: value.reshape(*shape, width) for name, value in fields.items()})


def _next_of(items: np.ndarray) -> np.ndarray:
    """Return for each item the next one of the batch, the first after the last; empty rows are passed over."""
    real = items[items >= 0]
    found = items.copy()
    found[items >= 0] = np.roll(real, -1)
    return found


def _crossed(sequences: Sequences, item: int, other: int, width: int) -> _Row:
    """Return the prompt of one item with the response of another; the prompt loses its front if both do not fit."""
    asked, answered = sequences_row(sequences, item), sequences_row(sequences, other)
    prompt = asked.tokens[: int(np.argmax(asked.loss_mask))]
    begin = int(np.argmax(answered.loss_mask))
    response, mask = answered.tokens[begin:][: width - 1], answered.loss_mask[begin:][: width - 1]
    prompt = prompt[max(0, len(prompt) + len(response) - width) :]
    return _Row(np.concatenate([prompt, response]), np.concatenate([np.zeros(len(prompt), mask.dtype), mask]), {})
