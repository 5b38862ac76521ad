"""Text in, text out: prompts sorted into batches of one width, completions in the prompts' own order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ftjax.peft.mixed import NONE, assign_rows
from ftjax.rollout.generate import Decoding, extend, start
from ftjax.rollout.prompts import Encoder, Prompt, pad
from ftjax.rollout.sampling import Sampling, settings
from ftjax.types import Model, Params

BLOCK = 16
"""Tokens written between two looks at the text for a stop string."""


def generate_text(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: jax.Array | None = None,
    batch_size: int = 32,
    stop: Sequence[str] = (),
    template: str = "auto",
    adapters: Sequence[int] | None = None,
) -> list[str]:
    """Return the completion of each prompt, in order, without its end-of-sequence token.

    Prompts of similar length share a batch, so little is padded; the rows are as many in each batch, so few programs are compiled. What a
    prompt gets depends neither on the others nor on `batch_size`: prompt `i` draws with `fold_in(key, i)`.

    Args:
      model: the architecture.
      params: its parameters, attached without a key.
      tokenizer: of the model.
      prompts: each a text to continue as it is, a list of messages to answer, or token ids (of `data.Encoder.prompt`, say).
      max_tokens: the most tokens of a completion.
      temperature: 0 for the most likely token. See `sampling.settings` for this and the next three.
      top_k: how many tokens to choose among; 0 for all.
      top_p: the probability mass to choose among.
      min_p: the least probability relative to the most likely token's.
      key: one key, or one for each prompt `[n]`; needed where the temperature is not 0.
      batch_size: the most rows generated at a time. On a CPU 16, 32 and 64 take about the same time.
      stop: texts that end a completion, and are not part of it.
      template: how messages become text: see `data.make_encoder`.
      adapters: for each prompt the place of its adapter, -1 for none, where `params` are those of `peft.stack_adapters`.

    Raises:
      ValueError: a prompt is empty, malformed or too long for the context; a setting is out of range.
    """
    sampling = settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if batch_size < 1:
        raise ValueError(f"generate_text: batch_size is at least 1, not {batch_size}.")
    encoder = Encoder(model, tokenizer, template=template)
    encoded = _encode_all(encoder, prompts, max_tokens)
    texts = [""] * len(encoded)
    for chosen, rows in _batches(encoded, batch_size):
        tokens, segment_ids = pad([encoded[at] for at in chosen], rows=rows)
        given = params if adapters is None else assign_rows(params, [*(adapters[at] for at in chosen), *[NONE] * (rows - len(chosen))])
        keys = None if key is None else _row_keys(key, chosen, rows)
        state = start(
            model, given, tokens, segment_ids, max_tokens=max_tokens, eos_ids=encoder.eos_ids, sampling=sampling, key=keys
        )  # fmt: skip
        found = _finish(model, given, state, encoder, sampling, tuple(stop))
        for at, text in zip(chosen, found, strict=False):
            texts[at] = text
    return texts


def stream_text(
    model: Model,
    params: Params,
    encoder: Encoder,
    prompt: Prompt,
    *,
    max_tokens: int,
    sampling: Sampling,
    key: jax.Array | None = None,
    stop: Sequence[str] = (),
    block: int = 4,
) -> Iterator[str]:
    """Yield the completion of one prompt piece by piece; the pieces joined are what `generate_text` returns.

    Args:
      model: the architecture.
      params: its parameters, attached without a key.
      encoder: of the prompt.
      prompt: as in `generate_text`.
      max_tokens: the most tokens of the completion.
      sampling: from `sampling.settings`.
      key: of the draws; this is prompt 0.
      stop: texts that end the completion.
      block: tokens written between two pieces.
    """
    tokens, segment_ids = pad([encoder.fit(prompt, max_tokens=max_tokens)])
    keys = None if key is None else _row_keys(key, [0], 1)
    state = start(model, params, tokens, segment_ids, max_tokens=max_tokens, eos_ids=encoder.eos_ids, sampling=sampling, key=keys)
    shown = 0
    while True:
        done = bool(state.finished[0]) or int(state.step) == max_tokens
        text, stopped = _text(encoder, _host(state.tokens)[0, : int(state.lengths[0])], stop)
        ready = len(text) if done or stopped else _certain(text, stop)
        if ready > shown:
            yield text[shown:ready]
            shown = ready
        if done or stopped:
            return
        state = extend(model, params, state, block, eos_ids=encoder.eos_ids, sampling=sampling)


def _batches(encoded: Sequence[np.ndarray], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield the prompts of each batch, sorted by length, and the rows of all batches: as even as can be, so that few rows are empty."""
    if not encoded:
        return
    count = -(-len(encoded) // batch_size)
    rows = -(-len(encoded) // count)
    order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at]))
    for first in range(0, len(order), rows):
        yield order[first : first + rows], rows


def _encode_all(encoder: Encoder, prompts: Sequence[Prompt], max_tokens: int) -> list[np.ndarray]:
    encoded = []
    for at, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encoder.fit(prompt, max_tokens=max_tokens))
        except ValueError as error:
            raise ValueError(f"prompt {at} of {len(prompts)}: {error}.") from error
    return encoded


def _row_keys(key: jax.Array, chosen: Sequence[int], rows: int) -> jax.Array:
    """Return a key for each row: those of the chosen prompts, and any for the rows without one."""
    at = jnp.asarray([*chosen, *[chosen[0]] * (rows - len(chosen))])
    return key[at] if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, at)


def _finish(model: Model, params: Params, state: Decoding, encoder: Encoder, sampling: Sampling, stop: tuple[str, ...]) -> list[str]:
    """Return the text of each row, written to its end; with stop strings a few tokens at a time, so that the rows end soon after them."""
    max_tokens = state.tokens.shape[1]
    block = BLOCK if stop else max_tokens
    while int(state.step) < max_tokens and not bool(jnp.all(state.finished)):
        state = extend(model, params, state, block, eos_ids=encoder.eos_ids, sampling=sampling)
        if stop:
            stopped = np.asarray([hit for _, hit in _texts(encoder, state, stop)])
            state = dataclasses.replace(state, finished=state.finished | jnp.asarray(stopped))
    return [text for text, _ in _texts(encoder, state, stop)]


def _texts(encoder: Encoder, state: Decoding, stop: Sequence[str]) -> list[tuple[str, bool]]:
    rows = zip(_host(state.tokens), _host(state.lengths), strict=True)
    return [_text(encoder, tokens[:length], stop) for tokens, length in rows]


def _host(x: jax.Array) -> np.ndarray:
    """Return the whole of a small array, also where other processes hold parts of it (then all of them ask)."""
    whole = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if whole else multihost_utils.process_allgather(x, tiled=True))


def _text(encoder: Encoder, tokens: np.ndarray, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text of some tokens up to the first stop string, and whether there was one."""
    text = encoder.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _certain(text: str, stop: Sequence[str]) -> int:
    """Return how many characters no further token can change: neither half a character, nor what may begin a stop string."""
    text = text.rstrip("\ufffd")
    held = max((size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)
    return len(text) - held
