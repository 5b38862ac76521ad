"""Numeric match, for GSM8K and its like: whether the final number of the completion is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ftjax.rewards.completion import Completion, text

# Digits with or without thousands separators and decimals. A minus is a sign unless it stands between two terms ("5-3").
_NUMBER = re.compile(r"(?:(?<![\w)\]%])[-−](?=[$€£\d.]))?[$€£]?\s?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_MARKS = (re.compile(r"####"), re.compile(r"(?i)\banswer\b"))


def numeric_match(
    prompts: Sequence[Any], completions: Sequence[Completion], *, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Return 1 for each completion whose final number equals that of its answer, else 0; None where the answer has no number.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      answer: a number, or a text whose final number counts (GSM8K's `… #### 72`).
      **columns: not looked at.
    """
    scores: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        wanted = final_number(str(right))
        scores.append(None if wanted is None else float(final_number(text(completion)) == wanted))
    return scores


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, else the one after the last "answer", else the last one; None if there is none.

    `1,234.50`, `$18`, `-3`, `25%` and `18.` are read as 1234.5, 18, -3, 25 and 18.
    """
    for mark in _MARKS:
        *before, tail = mark.split(text)
        if before and (found := _NUMBER.search(tail)):
            return _value(found[0])
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[,$€£\s]", "", number).replace("−", "-"))
