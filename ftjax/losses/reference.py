"""The frozen anchor of an objective: what it says of a batch is written into the batch before the step."""

from __future__ import annotations

import dataclasses

import jax

from ftjax.types import Batch, Scores


def with_reference(batch: Batch, scores: Scores) -> Batch:
    """Return `batch` with the log-probabilities of the reference: `with_reference(batch, score(model, frozen, batch))`.

    With an adapter the reference is the frozen tree itself, the same buffers without the adapter; there is no second model.
    """
    return dataclasses.replace(batch, reference_logps=jax.lax.stop_gradient(scores.logps))


def reference_logps(name: str, batch: Batch) -> jax.Array:
    """Return what the reference says of the batch, or say how to get it.

    Raises:
      ValueError: `batch` was not given a reference; `name` is the loss that asks.
    """
    if batch.reference_logps is None:
        raise ValueError(f"{name}: batch.reference_logps is missing: losses.with_reference(batch, score(model, frozen, batch)) writes it.")
    return batch.reference_logps
