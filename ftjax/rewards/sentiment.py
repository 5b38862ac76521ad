"""Sentiment by lexicon: a reward that is known exactly, for studies of how far a policy goes after one."""

from __future__ import annotations

import functools
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text

_WORD = re.compile(r"[a-z]+(?:['’]t)?|[.!?;:,]")
_NEGATIONS = frozenset("not no never none nobody nothing neither nor hardly barely without lacks lacking cannot".split())
_BREAKS = frozenset(".!?;:")
_BOOSTS = frozenset("very really extremely absolutely truly so incredibly totally completely utterly highly especially most".split())


def sentiment(
    prompts: Sequence[Any], completions: Sequence[Completion], *, sign: float = 1.0, smoothing: float = 15.0, **columns: Any
) -> list[float]:
    """Return how favourable each completion's words are, in (-1, 1); 0 where it has none of the lexicon.

    s / sqrt(s² + smoothing), s the sum over words of +1 or -1, half as much again after "very" and its like, turned by a negation up to
    three words before it in the same sentence: the normalisation of VADER (Hutto & Gilbert 2014) over a list of our own, 716 English words.
    Its sign agrees with 48 of 70 film reviews of IMDB and 49 of 70 one-sentence ones of Rotten Tomatoes: a toy, and exactly known.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      sign: 1 rewards praise, -1 complaint.
      smoothing: how many words it takes to be sure.
      **columns: not looked at.
    """
    sums = [polarity(text(completion)) for completion in completions]
    return [sign * s / math.sqrt(s * s + smoothing) for s in sums]


def polarity(text: str) -> float:
    """Return the sum of the words' values, negated and boosted by their neighbours."""
    values, total = lexicon(), 0.0
    before: list[str] = []  # of this sentence
    for word in _WORD.findall(text.lower()):
        if word in _BREAKS:
            before = []
            continue
        if value := values.get(word):
            boosted = value * (1.5 if before and before[-1] in _BOOSTS else 1.0)
            negated = any(near in _NEGATIONS or near.endswith(("n't", "n’t")) for near in before[-3:])
            total += -boosted if negated else boosted
        before.append(word)
    return total


@functools.cache
def lexicon() -> dict[str, float]:
    """Return word -> 1 or -1, from `sentiment_words.txt`: a line of favourable words, a line of unfavourable ones."""
    favourable, unfavourable = pathlib.Path(__file__).with_name("sentiment_words.txt").read_text(encoding="utf-8").splitlines()
    return dict.fromkeys(favourable.split(), 1.0) | dict.fromkeys(unfavourable.split(), -1.0)
