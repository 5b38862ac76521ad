"""Generation as two jitted programs: one reads the prompts, the other writes tokens until every row has ended.

Both are pure functions of a `Decoding`, which holds all there is to know: the cache, what was written, who has finished. The second takes
the number of tokens to stop at as a traced argument, so the whole completion at once and a stream of a few tokens at a time are the same
program, and equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax import models
from ftjax.models.cache import Cache
from ftjax.rollout.sampling import PENALTIES, Sampling, Seen, penalized, sample, settings
from ftjax.rollout.slots import vocabulary
from ftjax.types import Model, Params, pytree


@pytree
class Decoding:
    """Rows on their way. Column `i` of the arrays `[b, n]` is final for all `i < step`, and zero from a row's end on."""

    cache: Cache
    tokens: jax.Array
    """int32 `[b, n]`."""
    logps: jax.Array
    """float32 `[b, n]`."""
    behavior_logps: jax.Array
    """float32 `[b, n]`."""
    lengths: jax.Array
    """int32 `[b]`: tokens written to each row, its end-of-sequence token included."""
    finished: jax.Array
    """bool `[b]`."""
    step: jax.Array
    """int32 scalar: the column that is written next."""
    prompt_lengths: jax.Array
    """int32 `[b]`: real tokens of the prompts."""
    keys: jax.Array
    """`[b]`: a row's key; token `i` of the row is drawn with `fold_in(key, i)`."""
    seen: Seen | None = None
    """Kept where there are penalties."""


class Completion(NamedTuple):
    """What was written after each prompt."""

    tokens: jax.Array
    """int32 `[b, n]`, 0 after a row's end."""
    logps: jax.Array
    """float32 `[b, n]`: under the model at temperature 1, what `scoring.score` says of the same tokens; 0 after a row's end."""
    behavior_logps: jax.Array
    """float32 `[b, n]`: under the distribution that was drawn from; 0 for greedy choices and after a row's end."""
    lengths: jax.Array
    """int32 `[b]`: tokens of each row, its end-of-sequence token included."""
    finished: jax.Array
    """bool `[b]`: the row ended by itself, and was not cut at `max_tokens`."""


def generate(
    model: Model,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: jax.Array | None = None,
) -> Completion:
    """Continue prompts until each has ended or has `max_tokens` more tokens.

    A row's completion depends on its prompt and key alone: not on its padding, its neighbours or the shape of the batch (up to the
    rounding of differently shaped matrix products). One pair of programs is compiled for each (shape of tokens, max_tokens).
    What a method puts before every row (a prompt, a prefix) is read once, together with the prompts.

    Args:
      model: the architecture.
      params: its parameters, attached without a key: an adapter stays unmerged, dropout and noise are off.
      tokens: int `[b, t]`, padded on the left (see `ftjax.rollout.pad`).
      segment_ids: int `[b, t]`: 1 for the prompt's tokens, 0 for padding. A row of padding alone is finished from the start.
      max_tokens: the most tokens to write, at least 1.
      eos_ids: the tokens that end a row.
      temperature: 0 for the most likely token. See `sampling.settings` for this and the next three.
      top_k: how many tokens to choose among; 0 for all.
      top_p: the probability mass to choose among.
      min_p: the least probability relative to the most likely token's.
      key: one key, of which row `i` uses `fold_in(key, i)`, or a key for each row `[b]`. Needed where the temperature is not 0.

    Raises:
      ValueError: a setting is out of range, a key is missing, or the parameters hold a key.
    """
    chosen = settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    state = start(model, params, tokens, segment_ids, max_tokens=max_tokens, eos_ids=eos_ids, sampling=chosen, key=key)
    state = extend(model, params, state, max_tokens - 1, eos_ids=eos_ids, sampling=chosen)
    return Completion(state.tokens, state.logps, state.behavior_logps, state.lengths, state.finished)


def start(
    model: Model,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    sampling: Sampling,
    key: jax.Array | None = None,
) -> Decoding:
    """Read the prompts and write the first token of each row; the arguments and errors are those of `generate`.

    `sampling` is from `sampling.settings`; what its penalties look at goes with the state.
    """
    if max_tokens < 1:
        raise ValueError(f"generate: max_tokens is at least 1, not {max_tokens}.")
    refuse_keys("generate", params)
    if key is None and sampling.temperature is not None:
        raise ValueError("generate: a temperature other than 0 needs a key; pass key=jax.random.key(seed).")
    key = jax.random.key(0) if key is None else key
    return _prefill(model, params, tokens, segment_ids, key, _ids(eos_ids), sampling, max_tokens=max_tokens)


def extend(model: Model, params: Params, state: Decoding, num_tokens: int, *, eos_ids: Sequence[int] = (), sampling: Sampling) -> Decoding:
    """Write `num_tokens` more tokens to each row, fewer if all end before or have no room; `state` is donated.

    Streaming is to call this with a few tokens at a time: any cut gives the same tokens, by the same program.

    Raises:
      ValueError: there are penalties, and there were none at the start.
    """
    if penalized(sampling) and state.seen is None:
        asked = ", ".join(name for name in PENALTIES if getattr(sampling, name) is not None)
        raise ValueError(f"extend: the state does not know its tokens, which {asked} looks at: give start the same sampling.")
    return _decode(model, params, state, num_tokens, _ids(eos_ids), sampling)


def refuse_keys(who: str, params: Params) -> None:
    """Refuse parameters in which something random is at work; `who` is asked to generate with them."""
    if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{who}: the parameters hold a key, so dropout or noise would act: attach(frozen, trainable) without a key.")


def read_prompts(model: Model, params: Params, tokens: jax.Array, segment_ids: jax.Array, *, room: int) -> tuple[jax.Array, Cache]:
    """Return the hidden states `[b, t, d]` of prompts that are padded on the left, and a cache with room for so many tokens more."""
    b, t = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1, dtype=jnp.int32) - 1, 0)
    activations = jax.eval_shape(lambda: model.apply(params, tokens)[0]).dtype
    cache = models.init_cache(model.config, b, t + room, activations)
    return model.apply(params, tokens, positions=positions, segment_ids=segment_ids, cache=cache)


@partial(jax.jit, static_argnames=("model", "max_tokens"))
def _prefill(model: Model, params: Params, tokens, segment_ids, key, eos_ids, sampling, *, max_tokens: int) -> Decoding:
    b, real = tokens.shape[0], segment_ids > 0
    hidden, cache = read_prompts(model, params, tokens, segment_ids, room=max_tokens)
    keys = key if key.ndim else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(b))
    state = Decoding(
        cache=cache,
        tokens=jnp.zeros((b, max_tokens), jnp.int32),
        logps=jnp.zeros((b, max_tokens), jnp.float32),
        behavior_logps=jnp.zeros((b, max_tokens), jnp.float32),
        lengths=jnp.zeros((b,), jnp.int32),
        finished=~jnp.any(real, axis=1),
        step=jnp.zeros((), jnp.int32),
        prompt_lengths=jnp.sum(real, axis=1, dtype=jnp.int32),
        keys=keys,
        seen=_seen(tokens, real, vocabulary(model, params)) if penalized(sampling) else None,
    )
    return _append(model, params, hidden[:, -1], state, eos_ids, sampling)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _decode(model: Model, params: Params, state: Decoding, num_tokens, eos_ids, sampling) -> Decoding:
    stop = jnp.minimum(state.step + num_tokens, state.tokens.shape[1])

    def body(state: Decoding) -> Decoding:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        positions = (state.prompt_lengths + state.step - 1)[:, None]
        hidden, cache = model.apply(params, last, positions=positions, cache=state.cache)
        return _append(model, params, hidden[:, 0], dataclasses.replace(state, cache=cache), eos_ids, sampling)

    return jax.lax.while_loop(lambda state: (state.step < stop) & ~jnp.all(state.finished), body, state)


def _append(model: Model, params: Params, hidden: jax.Array, state: Decoding, eos_ids: jax.Array, sampling: Sampling) -> Decoding:
    """Choose the next token of each row from the last hidden states `[b, d]`; rows that have finished get zeros."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    draw = sample(model.unembed(model.head(params), hidden), keys, sampling, seen=state.seen)
    live, seen = ~state.finished, state.seen
    if seen is not None:
        written = seen.written.at[jnp.arange(len(live)), draw.tokens].add(live.astype(jnp.int32))
        seen = dataclasses.replace(seen, written=written)

    def write(into: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(into, jnp.where(live, values, 0)[:, None], state.step, axis=1)

    ended = jnp.any(draw.tokens[:, None] == eos_ids[None, :], axis=1)
    return dataclasses.replace(
        state,
        tokens=write(state.tokens, draw.tokens),
        logps=write(state.logps, draw.logps),
        behavior_logps=write(state.behavior_logps, draw.behavior_logps),
        lengths=state.lengths + live.astype(jnp.int32),
        finished=state.finished | ended,
        step=state.step + 1,
        seen=seen,
    )


def _seen(tokens: jax.Array, real: jax.Array, size: int) -> Seen:
    """Return what has been seen of a vocabulary of some size when prompts `[b, t]` are read, `real` where they are no padding."""
    b = tokens.shape[0]
    prompted = jnp.zeros((b, size), bool).at[jnp.arange(b)[:, None], jnp.where(real, tokens, size)].set(True, mode="drop")
    return Seen(prompted, jnp.zeros((b, size), jnp.int32))


def _ids(eos_ids: Sequence[int]) -> jax.Array:
    return jnp.asarray(tuple(eos_ids), jnp.int32)
