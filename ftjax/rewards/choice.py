"""Multiple choice: which letter the completion settles on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text

# From the surest to the least sure sign; of each the last one counts. Bounded repeats: a page of blanks must not take a minute.
_SIGNS = (
    r"\\boxed\{{\s{{0,3}}(?:\\text\{{)?\(?([{letters}])\)?\}}?\s{{0,3}}\}}",
    r"(?i:\b(?:answer|choice|option)(?:\s{{1,3}}is)?)\s{{0,3}}:?[\s*(\[\"'“]{{0,6}}([{letters}])\b(?!['’])",
    r"[(\[]([{letters}])[)\]]",
    r"(?m:^)[ \t]{{0,8}}\*{{0,3}}([{letters}])\*{{0,3}}(?:[.):]|[ \t]{{0,8}}(?m:$))",
)


def choice(
    prompts: Sequence[Any], completions: Sequence[Completion], *, answer: Sequence[Any], letters: str = "ABCDEFGHIJ", **columns: Any
) -> list[float | None]:
    r"""Return 1 for each completion that settles on the right letter, else 0; None where the answer names none.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      answer: a letter (`B`, `(B)`, `The answer is B.`), or the index of one, from 0.
      letters: the choices, upper case, each a single letter.
      **columns: not looked at.
    """
    scores: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        wanted = _letter(right, letters)
        scores.append(None if wanted is None else float(chosen(text(completion), letters) == wanted))
    return scores


def chosen(text: str, letters: str = "ABCDEFGHIJ") -> str | None:
    r"""Return the last letter after `\boxed`, else after "answer is" and its like, else in brackets, else at the start of a line."""
    for sign in _SIGNS:
        if found := re.findall(sign.format(letters=re.escape(letters)), text):
            return found[-1]
    return None


def _letter(answer: Any, letters: str) -> str | None:
    if isinstance(answer, int):
        return letters[answer] if 0 <= answer < len(letters) else None
    answer = str(answer if answer is not None else "").strip()
    return answer if len(answer) == 1 and answer in letters else chosen(answer, letters)
