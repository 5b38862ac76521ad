r"""Maths: whether the completion's formula equals the right one, by `math-verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text
from ftjax.rewards.extras import check
from ftjax.rewards.worker import Worker

_VERIFIER = Worker("maths", "math_verify", isolated=False)


def maths(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    answer: Sequence[Any],
    plain: bool = False,
    after: str = "",
    seconds: float = 5.0,
    most: float = 120.0,
    **columns: Any,
) -> list[float | None]:
    r"""Return 1 for each completion whose LaTeX formula, a boxed one first, equals the answer, else 0; None where the answer is no formula.

    TRL's `accuracy_reward`, whose column is `solution`; with `after="</think>"` its `reasoning_accuracy_reward`. A comparison that
    takes too long counts as unequal. It runs in a process of its own, so threads may call this.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      answer: right answers: `\frac{1}{3}`, `$x^2$`, `72`.
      plain: read numbers and formulas outside LaTeX too.
      after: only what follows the last one of these counts; a completion without it scores 0.
      seconds: of each comparison.
      most: seconds after which no further one begins: those that are left score None.
      **columns: not looked at.
    """
    check("math_verify")
    pairs = [(_after(text(completion), after), right) for completion, right in zip(completions, answer, strict=True)]
    asked = [{"text": given, "answer": str(right), "plain": plain} for given, right in pairs if not (given is None or right is None)]
    replies = iter(_VERIFIER.ask(asked, seconds=seconds, together=True, most=most))
    return [None if right is None else 0.0 if given is None else _score(next(replies)) for given, right in pairs]


def _score(reply: dict[str, Any]) -> float | None:
    """Return a score; a completion that makes the verifier fail is no right answer."""
    return None if "late" in reply else reply.get("value", 0.0)


def _after(text: str, mark: str) -> str | None:
    if not mark:
        return text
    _, found, rest = text.rpartition(mark)
    return rest if found else None
