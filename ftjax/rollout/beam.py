"""Beam search: the most likely completions that a few beams find, as one jitted program over the same cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.rollout.generate import read_prompts
from ftjax.types import Model, Params


class Beams(NamedTuple):
    """The completions found after each prompt, the best first."""

    tokens: jax.Array
    """int32 `[b, w, n]`, 0 after an end."""
    scores: jax.Array
    """float32 `[b, w]`: the log-probability divided by `length ** length_penalty`; -inf where fewer were found."""
    lengths: jax.Array
    """int32 `[b, w]`, the end-of-sequence token included."""


def beam_search(
    model: Model,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    num_beams: int,
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> Beams:
    """Return the best completions by log p(completion) / length ** length_penalty.

    Each step extends every beam by every token. Of the w best candidates those that end are finished, and the w best that do not go on,
    until none of them can beat the finished ones at its present length, or `max_tokens` are written: what `transformers` does with
    `early_stopping=False`.

    Args:
      model: the architecture.
      params: its parameters, attached without a key.
      tokens: int `[b, t]`, padded on the left (see `rollout.pad`).
      segment_ids: int `[b, t]`: 1 for the prompts' tokens, 0 for padding.
      num_beams: w, at least 1.
      max_tokens: the most tokens to write, at least 1.
      eos_ids: the tokens that end a completion.
      length_penalty: above 0 favours long completions, below 0 short ones.

    Raises:
      ValueError: a number is out of its range.
    """
    for name, value in (("num_beams", num_beams), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"beam_search: {name} is at least 1, not {value}.")
    ends = jnp.asarray(tuple(eos_ids), jnp.int32)
    return _search(model, params, tokens, segment_ids, ends, jnp.float32(length_penalty), num_beams=num_beams, max_tokens=max_tokens)


class _State(NamedTuple):
    step: jax.Array
    cache: Any
    hidden: jax.Array
    """`[b·w, d]`: after the last token of each beam."""
    going: Beams
    """With plain sums of log-probabilities as scores."""
    found: Beams
    open: jax.Array
    """bool `[b]`: a beam of the prompt has been able to beat the finished ones at each step. Where it is not, the search is over, though
    beams that a neighbour keeps going may come into reach again: their sums are divided by ever more."""


@partial(jax.jit, static_argnames=("model", "num_beams", "max_tokens"))
def _search(model, params, tokens, segment_ids, ends, length_penalty, *, num_beams: int, max_tokens: int) -> Beams:
    b, w = tokens.shape[0], num_beams
    hidden, cache = read_prompts(model, params, tokens, segment_ids, room=max_tokens)
    every = jnp.repeat(jnp.arange(b), w)
    # At first all beams of a prompt are one and the same, so only one may be extended.
    sums = jnp.broadcast_to(jnp.where(jnp.arange(w) == 0, 0.0, -jnp.inf)[None], (b, w))
    none = Beams(jnp.zeros((b, w, max_tokens), jnp.int32), jnp.full((b, w), -jnp.inf), jnp.zeros((b, w), jnp.int32))
    first = _State(jnp.zeros((), jnp.int32), _rows(cache, every), hidden[every, -1], none._replace(scores=sums), none, jnp.ones((b,), bool))
    lengths = jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32)[every]

    def body(state: _State) -> _State:
        parents, going, found = _extend(model, params, state, ends, length_penalty, max_tokens)
        found = jax.tree.map(partial(_where, state.open), found, state.found)
        last = jnp.take_along_axis(going.tokens, jnp.full((b, w, 1), state.step), axis=2).reshape(b * w, 1)
        cache = _rows(state.cache, (parents + w * jnp.arange(b)[:, None]).reshape(-1))
        hidden, cache = model.apply(params, last, positions=(lengths + state.step)[:, None], cache=cache)
        step = state.step + 1
        reachable = going.scores[:, 0] / step.astype(jnp.float32) ** length_penalty
        return _State(step, cache, hidden[:, 0], going, found, state.open & (reachable > found.scores[:, -1]))

    return jax.lax.while_loop(lambda state: (state.step < max_tokens) & jnp.any(state.open), body, first).found


def _extend(model, params, state: _State, ends, length_penalty, max_tokens: int) -> tuple[jax.Array, Beams, Beams]:
    """Return which beam each of the next ones goes on from `[b, w]`, these, and the best that are finished."""
    b, w, _ = state.going.tokens.shape
    logps = jax.nn.log_softmax(model.unembed(model.head(params), state.hidden), axis=-1).reshape(b, w, -1)
    v = logps.shape[-1]
    enough = min((1 + len(ends)) * w, w * v)  # with w among them that do not end
    sums, places = jax.lax.top_k((state.going.scores[..., None] + logps).reshape(b, w * v), enough)
    parents, ids = places // v, (places % v).astype(jnp.int32)
    written = jnp.take_along_axis(state.going.tokens, parents[..., None], axis=1).at[:, :, state.step].set(ids)
    count = jnp.full(sums.shape, state.step + 1)
    ended = jnp.any(ids[..., None] == ends[None, None, :], axis=-1) | (state.step + 1 == max_tokens)
    # Only what is among the w best may finish, as in transformers.
    finished = jnp.where(ended & (jnp.arange(sums.shape[1]) < w)[None], sums / count.astype(jnp.float32) ** length_penalty, -jnp.inf)
    candidates = Beams(written, finished, count)
    found = _best(jax.tree.map(lambda one, two: jnp.concatenate([one, two], axis=1), state.found, candidates), w)[0]
    going, chosen = _best(Beams(written, jnp.where(ended, -jnp.inf, sums), count), w)
    return jnp.take_along_axis(parents, chosen, axis=1), going, found


def _best(beams: Beams, w: int) -> tuple[Beams, jax.Array]:
    """Return the `w` best of some beams, and their places."""
    scores, places = jax.lax.top_k(beams.scores, w)
    tokens = jnp.take_along_axis(beams.tokens, places[..., None], axis=1)
    return Beams(tokens, scores, jnp.take_along_axis(beams.lengths, places, axis=1)), places


def _where(rows: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *(1,) * (one.ndim - 1)), one, other)


def _rows(cache: Any, rows: jax.Array) -> Any:
    """Return the cache with other rows."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jnp.take(x, rows, axis=1 if x.ndim == 5 else 0), cache)
