"""Several items in a row: what is said of a packed row, taken apart into responses, so that an objective need not know of packing."""

from __future__ import annotations

import dataclasses
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.types import Batch, LossFn, Mean, Metrics, Scores

OF_TOKENS = (
    "tokens",
    "loss_mask",
    "positions",
    "reference_logps",
    "behavior_logps",
    "old_logps",
    "old_values",
    "advantages",
    "returns",
    "labels",
)
"""Fields of `Batch` that speak of tokens; the others speak of items, `[b, k]`, as advantages do where all tokens of a response have one."""
OF_ITEMS = ("desirable", "baseline", "desirable_share", "density_ratios", "margins")


def unpacked(loss: LossFn) -> LossFn:
    """Return the objective for packed rows: `loss` of the responses that `batch.places` finds in them.

    Rows `[b, w]` of k items with n responses become `[b k, n, t]`, or `[b k, t]` where n is 1. Documents of a row do not see each other,
    so value and gradient are those of the responses in rows of their own.
    """

    @wraps(loss)
    def of_rows(scores: Scores, batch: Batch) -> tuple[Mean, Metrics]:
        return loss(*unpack(scores, batch))

    return of_rows


def for_every_row(batch: Batch, mean: Mean) -> Float[Array, "*b"]:
    """Return the quotient of a mean over the whole step as each row, or packed item, has it; 0 where nothing was counted."""
    value = mean.total / jnp.where(mean.weight > 0, mean.weight, 1)
    return jnp.broadcast_to(value, batch.loss_mask.shape[:1] if batch.places is None else batch.places.shape[:2])


def unpack(scores: Scores, batch: Batch) -> tuple[Scores, Batch]:
    """Return scores and batch with a row for each response.

    Raises:
      ValueError: the batch does not say where its responses lie.
    """
    if batch.places is None:
        raise ValueError("unpacked: batch.places is missing: this loader does not pack judged responses.")
    rows, items, responses, tokens = batch.places.shape
    shape = (rows * items, responses, tokens) if responses > 1 else (rows * items, tokens)
    there = batch.places >= 0
    flat = jnp.maximum(batch.places, 0).reshape(rows, -1)

    def taken(values: jax.Array) -> jax.Array:
        found = jnp.take_along_axis(values, flat, axis=1).reshape(there.shape)
        return jnp.where(there, found, jnp.zeros((), values.dtype)).reshape(shape)

    def each(source: Any, names: tuple[str, ...], change) -> dict[str, jax.Array]:
        return {name: change(value) for name in names if (value := getattr(source, name)) is not None}

    single = () if batch.advantages is None or batch.advantages.shape == batch.tokens.shape else ("advantages",)
    of_tokens = each(batch, tuple(name for name in OF_TOKENS if name not in single), taken)
    of_tokens |= {"segment_ids": there.astype(batch.segment_ids.dtype).reshape(shape)}
    of_items = each(batch, (*OF_ITEMS, *single), lambda value: value.reshape(-1))
    names = tuple(field.name for field in dataclasses.fields(Scores))
    return Scores(**each(scores, names, taken)), Batch(**of_tokens, **of_items)
