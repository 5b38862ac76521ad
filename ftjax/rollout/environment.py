"""Environments: who answers a policy between its turns. One file with a class of two methods is enough to train against it.

    from ftjax.rollout import Reply

    class Parity:
        def reset(self, row):
            self.odd = int(row["answer"]) % 2
        def step(self, completion):
            right = ("odd" in completion) == self.odd
            return Reply("Right." if right else "No. Try again.", reward=float(right), done=right)

A config names it as `rollout.environment.name = "my/file.py:Parity"`, and its reward as `rewards.environment = 1.0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ftjax.data.formats import ROLES, Message
from ftjax.tree import nearest


class Reply(NamedTuple):
    """What an environment says to a turn; a plain tuple of the three will do."""

    observation: str | Sequence[Message] | None = None
    """What the policy reads before its next turn: a text, which becomes a user's message, or messages; None: it is given another turn."""
    reward: float | None = None
    """What the turn was worth: the episode's reward is the sum; None: nothing is said of it."""
    done: bool = False
    """Whether the episode is over."""


class Environment(Protocol):
    """One episode's world. Each episode has an object of its own; steps of different episodes may run at the same time."""

    def reset(self, row: Mapping[str, Any]) -> str | None:
        """Begin, and return what the policy is told after its prompt, if anything.

        It must be the same for the same row, for the samples of a prompt are compared: it becomes part of the prompt, when the data is
        read (by an object that sees nothing else).

        Args:
          row: the columns of the prompt's row, with the `answer` that counts as right.
        """

    def step(self, completion: str) -> Reply:
        """Answer a turn.

        Args:
          completion: what the policy wrote, special tokens too, without the one that ended it. It may be anything.
        """


Factory = Callable[[], Environment]
"""Makes the environment of an episode: a class, say."""


def checked(reply: Any) -> tuple[tuple[Message, ...], float | None, bool]:
    """Return what an environment said as `(messages, reward, done)`.

    Raises:
      ValueError: it is no `Reply`.
    """
    if not isinstance(reply, tuple) or len(reply) > 3:
        raise ValueError(f"step returns Reply(observation, reward, done), not {_short(reply)}")
    observation, reward, done = Reply(*reply)
    try:
        reward = None if reward is None else float(reward)
    except (TypeError, ValueError, OverflowError):  # the last of an integer beyond all floats
        raise ValueError(f"a reward is a number or None, not {_short(reward)}") from None
    if reward is not None and not math.isfinite(reward):
        raise ValueError(f"a reward is finite, not {reward}")
    if observation is None or isinstance(observation, str):
        return () if observation is None else (_message({"role": "user", "content": observation}),), reward, bool(done)
    return tuple(map(_message, observation)), reward, bool(done)


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise ValueError(f"an observation is a text, or messages with role and content, not {_short(message)}")
    if message.get("role") not in ROLES:
        raise ValueError(f"there is no role {message.get('role')!r}; nearest: {nearest(str(message.get('role')), ROLES)}")
    return {name: _clean(part) for name, part in message.items()}


def _clean(part: Any) -> Any:
    """Return a text without lone surrogates, which JSON can hold and neither a tokenizer nor a file."""
    return part.encode("utf-8", "replace").decode() if isinstance(part, str) else part


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "…"
