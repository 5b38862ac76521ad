"""Exact match: whether the completion is the answer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Completion], *, answer: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """Return 1 for each completion that equals its answer after `normalize`, else 0.

    Args:
      prompts: not looked at.
      completions: what the model wrote, without the end-of-turn token.
      answer: the right answers; None where there is none, which scores None.
      **columns: not looked at.
    """
    pairs = zip(completions, answer, strict=True)
    return [None if right is None else float(normalize(text(completion)) == normalize(right)) for completion, right in pairs]


def normalize(text: str) -> str:
    """Return text as `exact_match` compares it: NFKC, white space collapsed and stripped, one full stop at the end dropped.

    Upper and lower case differ, and so does everything else.
    """
    text = " ".join(unicodedata.normalize("NFKC", str(text)).split())
    return text.removesuffix(".").rstrip()
