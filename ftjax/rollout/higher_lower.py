"""A game for a policy: find a number, told after each guess whether it is higher or lower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ftjax.rollout.environment import Reply

_NUMBER = re.compile(r"-?\d{1,18}")


class HigherLower:
    """The number is the row's `answer`. The last number of a turn is the guess; finding it ends the episode and is worth 1.

    >>> game = HigherLower()
    >>> game.reset({"answer": "37"})
    >>> [game.step(guess).observation for guess in ("50", "I say 25.", "it is twelve")]
    ['Lower.', 'Higher.', 'Say a number.']
    >>> game.step("37")
    Reply(observation='Right.', reward=1.0, done=True)
    """

    def reset(self, row: Mapping[str, Any]) -> None:
        """Take the number; the prompt says between which bounds it is.

        Raises:
          ValueError: the row's answer is no whole number.
        """
        try:
            self.number = int(row["answer"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"higher_lower: a row needs a whole number as its answer, not {row.get('answer')!r}") from None

    def step(self, completion: str) -> Reply:
        """Answer a guess."""
        found = _NUMBER.findall(completion)
        if not found:
            return Reply("Say a number.", reward=0.0)
        guess = int(found[-1])
        if guess == self.number:
            return Reply("Right.", reward=1.0, done=True)
        return Reply("Lower." if guess > self.number else "Higher.", reward=0.0)
