"""What a policy says of given tokens: the one road from a model to a loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax import weights
from ftjax.kernels.logps import token_logps
from ftjax.types import VALUE_HEAD, Batch, Model, Params, Scores

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

    logps[t] = log softmax(head(hidden[t-1]))[tokens[t]]        values[t] = hidden[t] · w + b

    The logits are never held: see `ftjax.kernels.logps`. Leading axes of the batch (pairs, groups) are rows like any other.

    Args:
      model: the architecture.
      params: its parameters, attached.
      batch: tokens `[*b, t]` and masks.
      chunk_tokens: tokens of each row whose logits exist at a time; from `CHUNK_LOGITS` and the vocabulary if None.
      batch_shards: over how many devices the rows are split, which makes the default chunk larger.
      outputs: what to return beside `logps`: `mean_logps`, `entropy`, `greedy`, `log_collision`, and `values` where there is a value head.

    Raises:
      ValueError: values are asked for and the parameters have no value head.
    """
    shape = batch.tokens.shape
    tokens, mask, positions, segments = (
        x.reshape(-1, shape[-1]) for x in (batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids)
    )
    value_head = params.get(VALUE_HEAD)
    if "values" in outputs and value_head is None:
        raise ValueError("scoring: values are asked for and the parameters have no value head: add peft.value_head() to the method.")
    params = {name: branch for name, branch in params.items() if name != VALUE_HEAD}
    hidden, _ = model.apply(params, tokens, positions=positions, segment_ids=segments)
    # Position t predicts token t + 1, inside one document only.
    counted = _ahead(mask) * (_ahead(segments) == segments).astype(mask.dtype)
    head = model.head(params)
    vocabulary = jax.eval_shape(model.unembed, head, hidden[:, :1]).shape[-1]
    rows = -(-tokens.shape[0] // batch_shards)
    chunk = chunk_tokens or max(1, CHUNK_LOGITS // (rows * vocabulary))
    wanted = ("logps", *(name for name in outputs if name not in ("logps", "values")))
    found = token_logps(model.unembed, head, hidden, _ahead(tokens), counted, chunk=chunk, outputs=wanted)
    values = _values(value_head, hidden, segments > 0).reshape(shape) if "values" in outputs else None
    return Scores(**{name: _back(value).reshape(shape) for name, value in found.items()}, values=values)


def _values(head: Params, hidden: jax.Array, real: jax.Array) -> jax.Array:
    """Return `hidden [b, t, d] · w + b` in float32, 0 in the padding, whose hidden states may be anything."""
    hidden = jnp.where(real[..., None], hidden, jnp.zeros((), hidden.dtype)).astype(jnp.float32)
    values = weights.dot(hidden, head["kernel"])[..., 0]
    if "bias" in head:
        values = values + head["bias"][None, :].astype(jnp.float32)
    return jnp.where(real, values, 0.0)


def _ahead(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _back(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
