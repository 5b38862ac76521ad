"""Text in, text out: prompts of any length through the engine, or one of them piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.peft.mixed import NONE
from ftjax.rollout.engine import Engine
from ftjax.rollout.generate import extend, start
from ftjax.rollout.prompts import Encoder, Prompt, pad
from ftjax.rollout.requests import Request
from ftjax.rollout.sampling import Sampling, settings
from ftjax.rollout.stopping import certain, end, refusal, shown
from ftjax.types import Model, Params


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

    A prompt that has ended makes room for the next (see `Engine`). What a prompt gets depends neither on the others nor on `batch_size`:
    prompt `i` draws with `fold_in(key, i)`.

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
      batch_size: the most prompts continued at a time.
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
    keys = [None] * len(encoded) if key is None else _keys(key, len(encoded))[:, None]
    adapters = [NONE] * len(encoded) if adapters is None else adapters
    for name, given in (("keys", keys), ("adapters", adapters)):
        if len(given) != len(encoded):
            raise ValueError(f"generate_text: {len(given)} {name} for {len(encoded)} prompts; give one for each.")
    requests = [
        Request(tokens, max_tokens, sampling=sampling, key=own, stop=stop, adapter=adapter)
        for tokens, own, adapter in zip(encoded, keys, adapters, strict=True)
    ]
    engine = Engine(model, encoder.eos_ids, tokenizer=tokenizer, slots=min(batch_size, max(1, len(encoded))))
    return [shown(tokenizer.decode, sample.tokens, stop) for sample in engine.generate(params, requests)]


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

    Raises:
      ValueError: as `generate_text`.
    """
    if wrong := refusal(stop):
        raise ValueError(f"stream_text: stop is {wrong}.")
    tokens, segment_ids = pad([encoder.fit(prompt, max_tokens=max_tokens)])
    keys = None if key is None else _keys(key, 1)
    state = start(model, params, tokens, segment_ids, max_tokens=max_tokens, eos_ids=encoder.eos_ids, sampling=sampling, key=keys)
    said, looked_at, decode = 0, 0, encoder.tokenizer.decode
    while True:
        written = np.asarray(state.tokens)[0, : int(state.lengths[0])]
        ended = end(decode, written, stop, before=looked_at)
        last = bool(ended) or bool(state.finished[0]) or int(state.step) == max_tokens
        text = shown(decode, written[: ended or None], stop)
        ready = len(text) if last else certain(text, stop)
        if ready > said:
            yield text[said:ready]
            said = ready
        if last:
            return
        looked_at = len(written)
        state = extend(model, params, state, block, eos_ids=encoder.eos_ids, sampling=sampling)


def _encode_all(encoder: Encoder, prompts: Sequence[Prompt], max_tokens: int) -> list[np.ndarray]:
    encoded = []
    for at, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encoder.fit(prompt, max_tokens=max_tokens))
        except ValueError as error:
            raise ValueError(f"prompt {at} of {len(prompts)}: {error}.") from error
    return encoded


def _keys(key: jax.Array, count: int) -> jax.Array:
    """Return a key for each of the prompts."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
