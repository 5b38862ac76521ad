"""Episodes: a policy and an environment take turns, and the tokens that the policy sampled are those that it learns from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax import data
from ftjax.data.formats import Message
from ftjax.rollout.deadline import within
from ftjax.rollout.engine import Engine
from ftjax.rollout.environment import Environment, Factory, checked
from ftjax.rollout.requests import Episode, Request, Sample
from ftjax.rollout.sampling import Sampling
from ftjax.rollout.turns import Turns
from ftjax.types import Params

_LATER = 2**30
"""More than the tokens of any turn: token `i` of the first turn is drawn with `fold_in(key, i)`, and turn `k` with keys of its own."""


class _Heard(NamedTuple):
    """What an environment said to a turn, as plain data."""

    told: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False
    failure: str = ""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where episodes are played, and how long they may be."""

    engine: Engine
    """With a tokenizer if there are stop texts."""
    turns: Turns
    make: Factory
    """Called once an episode."""
    _: dataclasses.KW_ONLY
    max_tokens: int
    """Of an episode after its prompt, what the policy was told included."""
    max_turns: int
    """Of the policy."""
    stop: Sequence[str] = ()
    """Texts that end a turn, beside the engine's `eos_ids`."""
    seconds: float = 300.0
    """That an environment may take for an answer."""
    part: tuple[int, int] = (0, 1)
    """Which process this is, and of how many that play the same episodes: each has the environments of its share of them."""
    gathered: Callable[[Any], list[Any]] = _alone
    """What each of these processes has, from what this one has: plain data."""


def play(stage: Stage, params: Params, prompts: Sequence[data.Prompt], keys: jax.Array, *, sampling: Sampling) -> list[Sample]:
    """Return an episode for each key, in order: its turns in one `Sample`, with an `Episode`.

    All that are still open take a turn together, by one call of the engine; the environments answer side by side. The first turn is what
    the engine says to the prompts without an environment, to the bit; an episode of one turn is that sample. An episode depends on its
    prompt and key and on what its environment says, not on neighbours or order.

    Token in, token out: a turn is asked for with exactly the tokens that were sampled and appended before it. They are read again for it,
    since the slots' cache goes to whoever is next: (T - 1) / 2 times a whole episode of T equal turns. That is reading, many tokens at a
    time, and small beside writing while turns are few. A turn waits for the slowest of its round.

    An episode ends by itself where its environment says so. It is cut, and not `finished`, by `max_tokens` (within a turn, whose text its
    environment still sees, or where an observation leaves no room for an answer), by `max_turns`, or by an environment that raises, hangs
    or makes no sense, which `Episode.failure` names.

    Args:
      stage: how episodes are played.
      params: the policy's, attached without a key.
      prompts: p of them, as `opened` leaves them.
      keys: `[p, g]`, one an episode.
      sampling: from `sampling.settings`.
    """
    episodes = [_Playing(stage, prompt) for prompt in prompts for _ in range(keys.shape[1])]
    for at, heard in _asked(stage, {at: episode.begin for at, episode in enumerate(episodes)}).items():
        episodes[at].failure = heard.failure
    options = {"sampling": sampling, "stop": tuple(stage.stop)}
    asked = [
        Request(prompt.tokens, stage.max_tokens, key=key, num_samples=len(key), **options)
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    flat, going = keys.reshape(-1), list(range(len(episodes)))
    for turn in range(stage.max_turns):
        if turn:
            later = jax.vmap(jax.random.fold_in, (0, None))(flat, _LATER + turn)
            asked = [episodes[at].request(later[at], **options) for at in going]
        samples = stage.engine.generate(params, asked)
        said = {at: episodes[at].hear(sample) for at, sample in zip(going, samples, strict=True)}
        for at, heard in _asked(stage, said).items():
            episodes[at].answer(heard, last=turn + 1 == stage.max_turns)
        going = [at for at in going if episodes[at].reason is None]
        if not going:
            break
    return [episode.sample() for episode in episodes]


def opened(example: data.Example, make: Factory) -> data.Example:
    """Return a prompt with what its environment says at the beginning: a paragraph more of the user's last message, or one of its own.

    Raises:
      Exception: whatever `reset` raises.
    """
    told = _reset(make(), example)
    if not told:
        return example
    messages, answer = list(example.messages), []
    if messages and messages[-1]["role"] == "assistant":
        answer = [messages.pop()]
    if messages and messages[-1]["role"] == "user":
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{told}"}
    else:
        messages.append({"role": "user", "content": told})
    return dataclasses.replace(example, messages=(*messages, *answer))


def _asked(stage: Stage, calls: Mapping[int, Callable[[], Any]]) -> dict[int, _Heard]:
    """Return what the environments of some episodes say, each asked by the process that has it, side by side."""
    index, count = stage.part
    mine = [at for at in calls if at % count == index]
    said = map(_heard, within(stage.seconds, [calls[at] for at in mine]))
    found = {at: _Heard(*heard) for part in stage.gathered(list(zip(mine, said, strict=True))) for at, heard in part}
    return {at: found[at] for at in calls}


def _heard(said: Any) -> _Heard:
    """Return what came of a call."""
    if isinstance(said, BaseException):
        return _Heard(failure=_said(said))
    try:
        found = _Heard(*checked(said))
        json.dumps(found)
    except (TypeError, ValueError, RecursionError) as error:
        return _Heard(failure=str(error))
    return found


def _row(example: data.Example) -> dict[str, Any]:
    return dict(data.Prompt(np.zeros(0, np.int32), example).columns)


def _reset(environment: Environment, example: data.Example) -> str | None:
    told = environment.reset(_row(example))
    if told is not None and not isinstance(told, str):
        raise ValueError(f"reset returns a text or None, not {type(told).__name__}")
    return told


def _begin(make: Factory, prompt: data.Prompt) -> Environment:
    environment = make()
    told = _reset(environment, prompt.example)
    if told and not prompt.text.endswith(told):
        raise ValueError(f"reset says {told[:60]!r}, which it did not say to the same row when the data was read")
    return environment


class _Playing:
    """An episode on its way."""

    def __init__(self, stage: Stage, prompt: data.Prompt):
        self.stage, self.prompt = stage, prompt
        self.environment: Environment | None = None
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.messages: list[Message] = []
        self.reward: float | None = None
        self.reason: str | None = None
        self.failure = ""
        self.written: Sample | None = None

    @property
    def length(self) -> int:
        return sum(len(part[0]) for part in self.parts)

    def begin(self) -> tuple[()]:
        """Make the environment; there is nothing to hear of it."""
        self.environment = _begin(self.stage.make, self.prompt)
        return ()

    def request(self, key: jax.Array, **options) -> Request:
        """Return what the next turn is asked with."""
        tokens = np.concatenate([self.prompt.tokens, *(part[0] for part in self.parts)])
        return Request(tokens, self.stage.max_tokens - self.length, key=key[None], **options)

    def hear(self, sample: Sample) -> Callable[[], Any]:
        """Take in a turn, and return how its environment is asked."""
        self.written = sample
        self.parts.append((sample.tokens, sample.logps, sample.behavior_logps, np.ones(len(sample.tokens), bool)))
        text = sample.tokens[:-1] if sample.reason == "eos" else sample.tokens
        decode = self.stage.turns.encoder.tokenizer.decode
        self.messages.append({"role": "assistant", "content": decode(text.tolist(), skip_special_tokens=True)})
        return lambda: () if self.environment is None or self.failure else self.environment.step(decode(text.tolist()))

    def answer(self, heard: _Heard, *, last: bool) -> None:
        """Take in what the environment said, and go on or end."""
        self.failure = self.failure or heard.failure
        if not self.failure:
            try:
                self.reason = self._after(heard, last=last)
            except ValueError as error:  # a template that refuses what was said
                self.failure = str(error)
        self.reason = "failure" if self.failure else self.reason

    def _after(self, heard: _Heard, *, last: bool) -> str | None:
        """Return why the episode ends, if it does; if not, what the policy was told is in its tokens."""
        assert self.written is not None, "a turn comes before its answer"
        self.reward = self.reward if heard.reward is None else (self.reward or 0.0) + heard.reward
        self.messages += heard.told
        if heard.done or self.written.reason == "length":
            return self.written.reason
        if last:
            return "turns"
        tokens = self.stage.turns.tokens(self.prompt.example, heard.told, ended=self.written.reason == "eos")
        if self.length + len(tokens) >= self.stage.max_tokens:
            return "length"
        nothing = np.zeros(len(tokens), np.float32)
        self.parts.append((tokens, nothing, nothing, np.zeros(len(tokens), bool)))
        return None

    def sample(self) -> Sample:
        tokens, logps, behavior_logps, drawn = (np.concatenate(x) for x in zip(*self.parts, strict=True))
        assert self.reason is not None
        return Sample(tokens, logps, behavior_logps, self.reason, Episode(drawn, tuple(self.messages), self.reward, self.failure))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
