"""The frozen anchor of an objective: what it says of a batch is written into the batch before the step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.types import Batch, Params, Scores


def with_reference(batch: Batch, scores: Scores) -> Batch:
    """Return `batch` with the log-probabilities of the reference: `with_reference(batch, score(model, frozen, batch))`.

    With an adapter the reference is the frozen tree itself, the same buffers without the adapter; there is no second model.
    """
    return dataclasses.replace(batch, reference_logps=jax.lax.stop_gradient(scores.logps))


def followed(reference: Params, policy: Params, done: Int[Array, ""], *, every_steps: int, alpha: float) -> Params:
    """Return the reference after `done` steps: every so many of them α θ + (1 - α) θ_ref, and else θ_ref as it is.

    Gorbatovski et al., 2024, arXiv 2404.09656 (TR-DPO): the soft update, and with α = 1 the hard one. Of a low-rank adapter the factors are
    mixed, not their product, so that the reference keeps its rank; where α is 1 that is the same.

    Args:
      reference: what is trainable, as the reference has it.
      policy: likewise as the policy has it, after the step.
      done: steps done, the last one included.
      every_steps: between two updates, at least 1.
      alpha: in (0, 1], the share of the policy.
    """
    now = done % every_steps == 0

    def mixed(ours: jax.Array, theirs: jax.Array) -> jax.Array:
        moved = alpha * theirs + (1 - alpha) * ours if jnp.issubdtype(ours.dtype, jnp.floating) else theirs
        return jnp.where(now, moved.astype(ours.dtype), ours)

    return jax.tree.map(mixed, reference, policy)


def reference_logps(name: str, batch: Batch) -> Float[Array, "*b t"]:
    """Return what the reference says of the batch, or say how to get it.

    Raises:
      ValueError: `batch` was not given a reference; `name` is the loss that asks.
    """
    if batch.reference_logps is None:
        raise ValueError(f"{name}: batch.reference_logps is missing: losses.with_reference(batch, score(model, frozen, batch)) writes it.")
    return batch.reference_logps
