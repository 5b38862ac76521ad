"""What a policy says of given tokens: the one road from a model to a loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax.kernels.logps import token_logps
from ftjax.types import Batch, Model, Params, Scores

CHUNK_LOGITS = 2**24
"""Logits that exist at a time on one device unless `chunk_tokens` says otherwise: 64 MiB in float32."""


def score(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    chunk_tokens: int | None = None,
    batch_shards: int = 1,
    outputs: tuple[str, ...] = ("logps", "entropy", "greedy"),
) -> Scores:
    """Return the log-probability of every token of `batch` that its loss mask counts.

    logps[t] = log softmax(head(hidden[t-1]))[tokens[t]]

    The logits are never held: see `ftjax.kernels.logps`. Leading axes of the batch (pairs, groups) are rows like any other.

    Args:
      model: the architecture.
      params: its parameters, attached.
      batch: tokens `[*b, t]` and masks.
      chunk_tokens: tokens of each row whose logits exist at a time; from `CHUNK_LOGITS` and the vocabulary if None.
      batch_shards: over how many devices the rows are split, which makes the default chunk larger.
      outputs: what to return beside `logps`: `mean_logps`, `entropy`, `greedy`.
    """
    shape = batch.tokens.shape
    tokens, mask, positions, segments = (
        x.reshape(-1, shape[-1]) for x in (batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids)
    )
    hidden, _ = model.apply(params, tokens, positions=positions, segment_ids=segments)
    # Position t predicts token t + 1, inside one document only.
    counted = _ahead(mask) * (_ahead(segments) == segments).astype(mask.dtype)
    head = model.head(params)
    vocabulary = jax.eval_shape(model.unembed, head, jax.ShapeDtypeStruct((1, hidden.shape[-1]), hidden.dtype)).shape[-1]
    rows = -(-tokens.shape[0] // batch_shards)
    chunk = chunk_tokens or max(1, CHUNK_LOGITS // (rows * vocabulary))
    wanted = ("logps", *(name for name in outputs if name != "logps"))
    found = token_logps(model.unembed, head, hidden, _ahead(tokens), counted, chunk=chunk, outputs=wanted)
    return Scores(**{name: _back(value).reshape(shape) for name, value in found.items()})


def _ahead(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _back(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
