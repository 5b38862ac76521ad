"""A trained reward model as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text


def reward_model(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    score: Callable[[Sequence[Any], list[str]], Sequence[float]],
    clip: float | None = None,
    **columns: Any,
) -> list[float]:
    """Return what a model thinks of each completion after its prompt.

    Args:
      prompts: handed to the model as they are.
      completions: what the policy wrote, handed on as strings.
      score: `(prompts, texts) -> scores`: whatever loads the model, renders the conversation and runs it.
      clip: bound of the absolute value, against outliers; None: none. A NaN stays one, for `judge` to name.
      **columns: not looked at.
    """
    scores = [float(value) for value in score(prompts, [text(completion) for completion in completions])]
    return scores if clip is None else [value if value != value else max(-clip, min(clip, value)) for value in scores]
