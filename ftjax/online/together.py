"""The samples of a prompt in one row: what they have in common stands once, and each goes on from it as a branch (`types.BRANCH`)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ftjax.data.beginnings import shared
from ftjax.losses.packing import OF_TOKENS
from ftjax.types import BRANCH, Batch


def together(batch: Batch, group: int) -> Batch:
    """Return the rows `[n, t]` of groups of samples as `[n / group, w]`, with `places`, for `losses.unpacked`: the same value and gradient.

    A prompt of p tokens with samples of n_i tokens takes p - 1 + Σ (n_i + 1) places, for the prompt's last token, which says what it thinks
    of a sample's first one, stands before each. Rows of their own take Σ (p + n_i). The width is rounded up, so that few programs are
    compiled.

    Args:
      batch: of NumPy arrays, each row one sample behind its prompt; those of a prompt follow each other.
      group: samples of a prompt.

    Raises:
      ValueError: the rows are no whole number of groups.
    """
    n, t = batch.tokens.shape
    if n % group:
        raise ValueError(f"together: {n} rows are no whole number of groups of {group}.")
    sizes = (np.asarray(batch.segment_ids) > 0).sum(axis=1).reshape(-1, group)
    stems = np.asarray([_stem(batch, first, sizes[first // group]) for first in range(0, n, group)])
    width = rounded(int((stems + (sizes - stems[:, None]).sum(axis=1)).max()))
    longest = min(t, rounded(int((sizes - stems[:, None]).max())))
    source, positions, segment_ids = (np.zeros((n // group, width), np.int32) for _ in range(3))
    places = np.full((n // group, group, 1, longest), -1, np.int32)
    for row, stem in enumerate(stems.tolist()):
        source[row, :stem], positions[row, :stem], segment_ids[row, :stem] = row * group * t + np.arange(stem), np.arange(stem), 1
        column = stem
        for sample, size in enumerate(sizes[row].tolist()):
            here, count = slice(column, column + size - stem), size - stem
            source[row, here] = (row * group + sample) * t + np.arange(stem, size)
            positions[row, here], segment_ids[row, here] = np.arange(stem, size), 1 + (sample + 1) * BRANCH
            places[row, sample, 0, :count] = np.arange(column, column + count)
            column += count
    given = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    fields = {}
    for name, values in given.items():
        if values is not None and name not in ("positions", "segment_ids"):
            whole = name in OF_TOKENS and np.ndim(values) == 2
            fields[name] = np.where(segment_ids > 0, np.asarray(values).reshape(-1)[source], 0) if whole else values.reshape(-1, group)
    return Batch(**{**fields, "positions": positions, "segment_ids": segment_ids, "places": places})


def rounded(length: int) -> int:
    """Return a width of at least `length`: 64, 80, 96, 112, 128, 160, …: four for each doubling, a fifth too wide at most.

    >>> [rounded(length) for length in (3, 65, 128, 129, 614)]
    [64, 80, 128, 160, 640]
    """
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return max(64, -(-length // step) * step)


def _stem(batch: Batch, first: int, sizes: np.ndarray) -> int:
    """Return how many tokens stand once for a group: its common beginning, but for the last token before anything that counts."""
    rows = slice(first, first + len(sizes))
    counted = np.asarray(batch.loss_mask[rows]).any(axis=0)
    size = min(int(np.argmax(counted)) if counted.any() else int(sizes.min()), int(sizes.min()))
    return max(0, shared(np.asarray(batch.tokens[rows]), size) - 1)
