"""What a policy says of given tokens: the one road from a model to a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ftjax import weights
from ftjax.kernels.logps import DIFFERENTIABLE, token_logps
from ftjax.kernels.per_token import per_token
from ftjax.types import TEACHER, VALUE_HEAD, Batch, Model, Params, Scores

CHUNK_LOGITS = 2**24
"""Logits that exist at a time on one device unless `chunk_tokens` says otherwise: 64 MiB in float32."""


def score(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    chunk_tokens: int | None = None,
    batch_shards: int = 1,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    outputs: tuple[str, ...] = ("logps", "entropy", "greedy"),
) -> Scores:
    """Return the log-probability of every token of `batch` that its loss mask counts.

    logps[t] = log softmax(head(hidden[t-1]) / T)[tokens[t]]        values[t] = hidden[t] · w + b

    The logits are never held: see `ftjax.kernels.logps`. Leading axes of the batch (pairs, groups) are rows like any other.

    Args:
      model: the architecture.
      params: its parameters, attached.
      batch: tokens `[*b, t]` and masks.
      chunk_tokens: tokens of each row whose logits exist at a time; from `CHUNK_LOGITS` and the vocabulary if None.
      batch_shards: over how many devices the rows are split, which makes the default chunk larger.
      temperature: T > 0, of every distribution spoken of: what a sampler drew at T is to be scored at T.
      entropy_gradient: whether the entropy carries a gradient, for an entropy bonus: see `kernels.logps` for what it costs.
      outputs: what to return beside `logps`: `mean_logps`, `entropy`, `greedy`, `log_collision`, and `values` where there is a value head.

    Raises:
      ValueError: values are asked for and the parameters have no value head, or no positive temperature.
    """
    if temperature <= 0:
        raise ValueError(f"scoring: temperature is above 0, not {temperature}: greedy tokens have no distribution.")
    if temperature != 1:
        model = model._replace(unembed=lambda head, hidden, unembed=model.unembed: unembed(head, hidden) / temperature)
    live = (*DIFFERENTIABLE, "entropy") if entropy_gradient else DIFFERENTIABLE
    return _scores(model, params, batch, _read(model, params, batch, chunk_tokens, batch_shards), outputs, live)


def score_against(
    model: Model,
    teacher: Model | None,
    params: Params,
    batch: Batch,
    *,
    divergence: Callable[..., Float[Array, "*b"]],
    chunk_tokens: int | None = None,
    batch_shards: int = 1,
    outputs: tuple[str, ...] = ("logps", "greedy"),
) -> Scores:
    """Return `score`, with the divergence of every counted token's distribution from a teacher's.

    The teacher is a model in the same program, whose parameters are the branch `types.TEACHER` of `params`: add it to the frozen tree after
    the method's `init`. It reads `batch.teacher` where that is given (another tokenizer) and the same tokens otherwise. Without a teacher
    what it said is stored in the batch: `teacher_ids` and `teacher_logps`.

    Args:
      model: the student's architecture.
      teacher: the teacher's, or None.
      params: the student's parameters, attached.
      batch: tokens `[*b, t]` and masks.
      divergence: `(student logits, teacher logits)`, of one token, e.g. `losses.distillation.jsd`; with stored log-probabilities
        `(student logits, ids, logps)`, e.g. `losses.distillation.stored_kl`.
      chunk_tokens: tokens of each row whose logits exist at a time, as in `score`.
      batch_shards: as in `score`.
      outputs: as in `score`, and `agreement`, whether both find the same token most likely, which asks for one vocabulary.

    Raises:
      ValueError: there is neither a teacher nor what one said.
    """
    shape = batch.tokens.shape
    rows = lambda x: x.reshape(-1, *x.shape[len(shape) - 1 :])  # noqa: E731
    teacher_params = params.get(TEACHER)
    params = {name: branch for name, branch in params.items() if name != TEACHER}
    if (teacher is None) != (teacher_params is None) or (teacher is None and batch.teacher_ids is None):
        raise ValueError(f"score_against: it needs a teacher and params[{TEACHER!r}], or neither and batch.teacher_ids and teacher_logps.")
    read = _read(model, params, batch, chunk_tokens, batch_shards)
    if teacher is None:
        extras, partners = [_ahead(rows(x)) for x in (batch.teacher_ids, batch.teacher_logps)], None
        tell = lambda ids, logps: (ids, logps)  # noqa: E731
    else:
        heard = batch if batch.teacher is None else batch.teacher
        said = _read(teacher, jax.lax.stop_gradient(teacher_params), heard, chunk_tokens, batch_shards)
        extras, partners = [said.hidden], said.counted
        tell = lambda hidden: (teacher.unembed(said.head, hidden),)  # noqa: E731

    def compare(logits: jax.Array, *extras: jax.Array) -> dict[str, jax.Array]:
        told = tell(*extras)
        found = {"divergence": divergence(logits, *told)}
        if "agreement" in outputs:
            theirs = told[0][..., 0] if teacher is None else jnp.argmax(told[0], axis=-1)
            found["agreement"] = (jnp.argmax(logits, axis=-1) == theirs.astype(jnp.int32)).astype(jnp.float32)
        return found

    found = per_token(compare, model.unembed, read.head, read.hidden, read.counted, *extras, chunk=read.chunk, extra_mask=partners)
    scores = _scores(model, params, batch, read, tuple(name for name in outputs if name != "agreement"))
    return dataclasses.replace(scores, **{name: _back(value).reshape(shape) for name, value in found.items()})


def likeliest(
    model: Model, params: Params, batch: Batch, *, count: int, chunk_tokens: int | None = None, batch_shards: int = 1
) -> tuple[Int[Array, "*b t k"], Float[Array, "*b t k"]]:
    """Return what a model finds most likely in the place of every counted token: `Batch.teacher_ids` and `teacher_logps`.

    Args:
      model: the architecture.
      params: its parameters.
      batch: tokens `[*b, t]` and masks.
      count: k.
      chunk_tokens: as in `score`.
      batch_shards: as in `score`.
    """
    read = _read(model, params, batch, chunk_tokens, batch_shards)

    def look(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        logps, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), count)
        return ids, logps

    found = per_token(look, model.unembed, read.head, read.hidden, read.counted, chunk=read.chunk)
    return tuple(_back(x).reshape(*batch.tokens.shape, count) for x in found)


class _Read(NamedTuple):
    """What a model makes of a batch before its head."""

    hidden: Float[Array, "b t d"]
    counted: Float[Array, "b t"]
    """1 where position t predicts a token t + 1 that counts."""
    head: Params
    chunk: int


def _read(model: Model, params: Params, batch: Batch, chunk_tokens: int | None, batch_shards: int) -> _Read:
    tokens, mask, positions, segments = (
        x.reshape(-1, batch.tokens.shape[-1]) for x in (batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids)
    )
    params = {name: branch for name, branch in params.items() if name != VALUE_HEAD}
    hidden, _ = model.apply(params, tokens, positions=positions, segment_ids=segments)
    # Position t predicts token t + 1, inside one document only.
    counted = _ahead(mask) * (_ahead(segments) == segments).astype(mask.dtype)
    head = model.head(params)
    vocabulary = jax.eval_shape(model.unembed, head, hidden[:, :1]).shape[-1]
    rows = -(-tokens.shape[0] // batch_shards)
    return _Read(hidden, counted, head, chunk_tokens or max(1, CHUNK_LOGITS // (rows * vocabulary)))


def _scores(
    model: Model, params: Params, batch: Batch, read: _Read, outputs: tuple[str, ...], live: tuple[str, ...] = DIFFERENTIABLE
) -> Scores:
    shape = batch.tokens.shape
    tokens, segments = (x.reshape(-1, shape[-1]) for x in (batch.tokens, batch.segment_ids))
    value_head = params.get(VALUE_HEAD)
    if "values" in outputs and value_head is None:
        raise ValueError("scoring: values are asked for and the parameters have no value head: add peft.value_head() to the method.")
    wanted = ("logps", *(name for name in outputs if name not in ("logps", "values")))
    options = {"chunk": read.chunk, "outputs": wanted, "differentiable": live}
    found = token_logps(model.unembed, read.head, read.hidden, _ahead(tokens), read.counted, **options)
    values = _values(value_head, read.hidden, segments > 0).reshape(shape) if "values" in outputs else None
    return Scores(**{name: _back(value).reshape(shape) for name, value in found.items()}, values=values)


def _values(head: Params, hidden: Float[Array, "b t d"], real: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Return `hidden · w + b` in float32, 0 in the padding, whose hidden states may be anything."""
    hidden = jnp.where(real[..., None], hidden, jnp.zeros((), hidden.dtype)).astype(jnp.float32)
    values = weights.dot(hidden, head["kernel"])[..., 0]
    if "bias" in head:
        values = values + head["bias"][None, :].astype(jnp.float32)
    return jnp.where(real, values, 0.0)


def _ahead(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, 1:], [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))


def _back(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
