"""Requests and samples: what the engine is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.peft.mixed import NONE
from ftjax.rollout.grammar import Grammar, starts
from ftjax.rollout.sampling import Sampling, stack
from ftjax.rollout.slots import NOTHING, Settings
from ftjax.rollout.stopping import refusal
from ftjax.types import Model


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued."""

    tokens: np.ndarray
    """int `[t]`, at least one."""
    max_tokens: int
    """The most tokens of a completion, at least 1."""
    _: dataclasses.KW_ONLY
    min_tokens: int = 0
    """Until a completion has so many, no token that would end it is chosen."""
    sampling: Sampling = Sampling()
    """From `sampling.settings`."""
    key: jax.Array | None = None
    """One key, of which sample `i` uses `fold_in(key, i)`, or a key for each sample `[n]`. Needed where the temperature is not 0."""
    num_samples: int = 1
    """Completions of this prompt, which is read once."""
    stop: Sequence[str] = ()
    """Texts that end a completion; its last tokens are the first that complete one of them."""
    stop_ids: Sequence[int] = ()
    """Tokens that end a completion, beside the engine's `eos_ids`."""
    grammar: Grammar | None = None
    """What the completion must be: `grammar.choice`, `grammar.regex` or `grammar.json_schema`."""
    adapter: int = NONE
    """The place of an adapter, -1 for none, where the parameters are those of `peft.stack_adapters`."""


class Episode(NamedTuple):
    """What there is to say beside its tokens of a sample between whose turns an environment spoke."""

    drawn: np.ndarray
    """bool `[n]`: which tokens the policy wrote; the others are what it was told."""
    messages: tuple[Mapping[str, Any], ...]
    """The turns in words, the policy's and what it was told, without the prompt."""
    reward: float | None
    """The sum of what the environment gave for each turn; None where it gave nothing."""
    failure: str = ""
    """What went wrong in the environment, if anything."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was written after a prompt."""

    tokens: np.ndarray
    """int32 `[n]`, the one that ended it included; of several turns with what was said between them."""
    logps: np.ndarray
    """float32 `[n]`: under the model at temperature 1, what `scoring.score` says of the same tokens; 0 where none was drawn."""
    behavior_logps: np.ndarray
    """float32 `[n]`: under the distribution that was drawn from; 0 for greedy choices, and where none was drawn."""
    reason: str
    """Why it ended: `"eos"`, `"stop"` (one of the request's texts or tokens) or `"length"`; of several turns also `"turns"`, it had no more
    of them, or `"failure"`, of the environment."""
    episode: Episode | None = None
    """Where an environment answered."""

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, and was not cut, at `max_tokens` or otherwise."""
        return self.reason in ("eos", "stop")

    @property
    def drawn(self) -> np.ndarray:
        """Bool `[n]`: which tokens the policy wrote."""
        return np.ones(len(self.tokens), bool) if self.episode is None else self.episode.drawn


def check(requests: Sequence[Request], *, model: Model, slot_tokens: int, eos_ids: Sequence[int], adapters: int, decodes: bool) -> None:
    """Refuse what cannot be answered.

    Args:
      requests: all of a call.
      model: whose context and vocabulary bound a text.
      slot_tokens: the longest text that a slot holds.
      eos_ids: the tokens that end a completion of any request.
      adapters: how many the parameters hold to choose from.
      decodes: the engine can turn tokens into text.

    Raises:
      ValueError: names the request and what is wrong with it.
    """
    context, vocabulary = int(model.config.max_position_embeddings), int(model.config.vocab_size)
    for at, request in enumerate(requests, 1):
        length, most, shape = len(request.tokens), request.max_tokens, None if request.key is None else request.key.shape
        drawn, last, ends = bool(request.sampling.temperature), request.grammar and request.grammar.eos_id, (*eos_ids, *request.stop_ids)
        typed = shape is None or jnp.issubdtype(request.key.dtype, jax.dtypes.prng_key)
        wrong, tokens = refusal(request.stop), np.asarray(request.tokens)
        stray = tokens[(tokens < 0) | (tokens >= vocabulary)]
        rules = (
            ("the prompt is empty", length > 0),
            (f"token {stray[:1].tolist()} is none of the model's {vocabulary:,}", not len(stray)),
            (f"max_tokens is at least 1, not {most}", most >= 1),
            (f"min_tokens is from 0 to max_tokens {most}, not {request.min_tokens}", 0 <= request.min_tokens <= most),
            (f"num_samples is at least 1, not {request.num_samples}", request.num_samples >= 1),
            ("a temperature other than 0 needs a key; pass key=jax.random.key(seed)", shape is not None or not drawn),
            ("its key is of the old kind; make it by jax.random.key(seed)", typed),
            (f"the key is one, or {request.num_samples} of them, not {shape}", shape in (None, (), (request.num_samples,))),
            (f"{length:,} tokens and max_tokens {most:,} exceed the {slot_tokens:,} of a slot", length + most <= slot_tokens),
            (f"{length:,} tokens and max_tokens {most:,} exceed the {context:,} of the model's context", length + most <= context),
            (f"its grammar ends by token {last}, which ends no completion: pass eos_id=one of {ends} to it", last is None or last in ends),
            (f"stop is {wrong}", not wrong),
            ("stop texts need an engine with a tokenizer", decodes or not request.stop),
            ("a grammar says itself how long a completion is; leave min_tokens out", request.grammar is None or not request.min_tokens),
            ("an adapter is asked for, and the parameters are not those of peft.stack_adapters", adapters or request.adapter == NONE),
            (f"its adapter is from {NONE}, none, to {adapters - 1}, not {request.adapter}", NONE <= request.adapter < max(adapters, 1)),
        )
        for rule, kept in rules:
            if not kept:
                raise ValueError(f"request {at} of {len(requests)}: {rule}.")


class Form(NamedTuple):
    """What the settings of a call have in common: the structure of `Settings`, which programs are compiled for."""

    eos_ids: tuple[int, ...]
    num_stop_ids: int
    min_tokens: bool
    """Whether a request has any."""
    like: Sampling
    """None where no request has a setting."""
    impl: str
    """Of the keys."""
    grammars: tuple[Grammar, ...]
    starts: tuple[int, ...]
    """Of the grammars, in their table."""

    def settings(self, samples: Sequence[tuple[Request, int]], size: int) -> Settings:
        """Return the settings of samples, each of a request and with a number in it, in the first of `size` entries."""
        requests = [request for request, _ in samples]

        def entries(values: Sequence, rest) -> np.ndarray:
            return np.asarray([*values, *[rest] * (size - len(values))])

        stops = [_filled((*self.eos_ids, *request.stop_ids), self.num_stop_ids) for request in requests]
        nothing = jax.random.key_data(jax.random.key(0, impl=self.impl))
        data = [nothing if request.key is None else jax.random.key_data(_key(request, number)) for request, number in samples]
        return Settings(
            entries([request.max_tokens for request in requests], 0).astype(np.int32),
            entries([request.min_tokens for request in requests], 0).astype(np.int32) if self.min_tokens else None,
            entries(stops, _filled((), self.num_stop_ids)).astype(np.int32),
            entries(list(map(np.asarray, data)), np.zeros_like(nothing)),
            stack([*(request.sampling for request in requests), *[Sampling()] * (size - len(requests))], like=self.like),
            entries([request.adapter for request in requests], NONE).astype(np.int32),
            entries([self._start(request) for request in requests], 0).astype(np.int32) if self.grammars else None,
        )

    def _start(self, request: Request) -> int:
        return 0 if request.grammar is None else self.starts[self.grammars.index(request.grammar)]


def form_of(requests: Sequence[Request], eos_ids: Sequence[int]) -> Form:
    """Return what requests have in common."""
    longest = len(eos_ids) + max(len(request.stop_ids) for request in requests)
    keys = (request.key for request in requests if request.key is not None)
    grammars = tuple({request.grammar: None for request in requests if request.grammar is not None})
    return Form(
        tuple(eos_ids),
        -(-longest // 4) * 4,  # so that a few more stop ids are no other program
        any(request.min_tokens for request in requests),
        stack([request.sampling for request in requests]),
        next((str(jax.random.key_impl(key)) for key in keys), "threefry2x32"),
        grammars,
        starts(grammars),
    )


def _key(request: Request, number: int) -> jax.Array:
    return request.key if request.key.ndim == 0 else request.key[number]


def _filled(ids: Sequence[int], size: int) -> tuple[int, ...]:
    return (*ids, *[NOTHING] * (size - len(ids)))
