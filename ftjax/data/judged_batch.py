"""Items as a batch: a row for each response, padded to one width, or several items in a row; with what is known of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.beginnings import shared
from ftjax.data.corpus import Sequences
from ftjax.types import BRANCH, Batch


class Crossing(NamedTuple):
    """What is to be known of items of one response so that prompts can get the responses of others."""

    prompts: np.ndarray
    """int64 `[items]`: equal where two items have the same prompt."""
    keep: int
    """Tokens at the front of every prompt that stay when it is cut: BOS."""


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
    crossing: Crossing | None = None,
) -> Batch:
    """Return the batch of some items: `[rows, responses, width]`, or `[rows, width]` where an item has one response.

    Args:
      sequences: item `i` has `responses` of them, from `i · responses` on.
      items: those of the global batch; -1 is an empty row.
      mine: the rows of it that are returned.
      responses: of an item.
      numbers: what is known of each item, by the field of `Batch`; 0 in an empty row.
      width: tokens of a row.
      crossing: add `mismatched`: each prompt with the response to another one of the global batch, as `crossed_with` says; a row is empty
        where there is none, and counts for nothing.
    """
    local = items[mine]
    rows = [sequences_row(sequences, item * responses + at) if item >= 0 else None for item in local for at in range(responses)]
    batch = padded(rows, width, (len(local), responses) if responses > 1 else (len(local),), names=sequences.known)
    known = {name: np.where(local < 0, 0, values[local]).astype(np.float32) for name, values in numbers.items()}
    batch = dataclasses.replace(batch, **known)
    if crossing is None:
        return batch
    others, real = np.full(len(items), -1), items >= 0
    found = crossed_with(crossing.prompts[items[real]])
    others[real] = np.where(found < 0, -1, items[real][found])
    pairs = zip(local.tolist(), others[mine].tolist(), strict=True)
    crossed = [_crossed(sequences, item, other, width, crossing.keep) if other >= 0 else None for item, other in pairs]
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
        found.append(shared([row.tokens for row in rows], min(int(np.argmax(row.loss_mask)) for row in rows)))
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


def crossed_with(prompts: np.ndarray) -> np.ndarray:
    """Return whose response each prompt gets, int `[n]`: that of another prompt, no response twice, and -1 for nobody's.

    So the mismatched responses are those of the batch, each behind another prompt. In an order in which equal prompts stand together every
    one gets the response that stands m places further on, in a circle, m being how often the most frequent prompt stands there: the next
    one's, where all differ. Where m is more than half of them, 2 (n - m) get one.

    Args:
      prompts: int `[n]`, equal where two prompts are the same.
    """
    if not len(prompts):
        return np.zeros(0, np.int64)
    _, first, group, counts = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first[group], kind="stable")
    found = np.empty(len(prompts), np.int64)
    found[order] = np.roll(order, -counts.max())
    return np.where(prompts[found] == prompts, -1, found)


def _crossed(sequences: Sequences, item: int, other: int, width: int, keep: int) -> _Row:
    """Return the prompt of one item with the response of another; after `keep` tokens the prompt loses its front if both do not fit."""
    asked, answered = sequences_row(sequences, item), sequences_row(sequences, other)
    prompt, begin = asked.tokens[: int(np.argmax(asked.loss_mask))], int(np.argmax(answered.loss_mask))
    response, mask = answered.tokens[begin:], answered.loss_mask[begin:]
    excess = max(0, len(prompt) + len(response) - width)
    prompt = np.concatenate([prompt[:keep], prompt[keep + excess :]])
    return _Row(np.concatenate([prompt, response]), np.concatenate([np.zeros(len(prompt), mask.dtype), mask]), {})
