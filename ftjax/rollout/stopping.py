"""Where a stop text ends a completion, and what is shown of it: one rule for the engine, for streams and for rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Decode = Callable[..., str]
"""A tokenizer's `decode`."""


def refusal(stop: Sequence[str]) -> str:
    r"""Return what stop texts are and these are not, "" if they are usable.

    >>> [bool(refusal(stop)) for stop in (("\n", "Q:"), "Q:", ["Q:", ""])]
    [False, True, True]
    """
    usable = not isinstance(stop, str) and all(isinstance(one, str) and one for one in stop)
    return "" if usable else f'a tuple of texts that are not empty, as ("\\nQuestion:",), not {stop!r}'


def end(decode: Decode, tokens: np.ndarray, stop: Sequence[str], *, before: int = 0, min_tokens: int = 0) -> int:
    """Return how many tokens it takes to complete a stop text, at least `min_tokens`; 0 if none is there.

    A text that fewer tokens had completed ends nothing.

    Args:
      decode: of the tokenizer.
      tokens: int `[t]`, of a completion.
      stop: texts that are not empty.
      before: so many tokens are known to complete none.
      min_tokens: of the completion.
    """

    def completed(count: int) -> bool:
        return _find(decode, tokens[:count], stop, min_tokens)[1] >= 0

    first = max(before + 1, min_tokens)
    return next(filter(completed, range(first, len(tokens) + 1)), 0) if stop and completed(len(tokens)) else 0


def shown(decode: Decode, tokens: np.ndarray, stop: Sequence[str] = (), *, min_tokens: int = 0) -> str:
    """Return the words of a completion, up to the text that ended it as `end` has it."""
    text, at = _find(decode, tokens, stop, min_tokens)
    return text if at < 0 else text[:at]


def certain(text: str, stop: Sequence[str]) -> int:
    """Return how many characters no further token can change: neither half a character, nor what may begin a stop text."""
    text = text.rstrip("\ufffd")
    held = max((size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)
    return len(text) - held


def _find(decode: Decode, tokens: np.ndarray, stop: Sequence[str], min_tokens: int) -> tuple[str, int]:
    """Return the words of some tokens, and where in them the first stop text begins that the first `min_tokens` - 1 do not hold, or -1."""

    def words(count: int) -> str:
        return decode(np.asarray(tokens)[:count].tolist(), skip_special_tokens=True)

    text = words(len(tokens))
    held = len(words(min_tokens - 1)) if stop and min_tokens > 1 else 0
    places = [text.find(one, max(0, held - len(one) + 1)) for one in stop]
    return text, min((at for at in places if at >= 0), default=-1)
