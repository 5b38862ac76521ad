"""What a completion says, whether it came as a string or as the messages of a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
Scores = Sequence[float | None]
Reward = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> Scores`, or a coroutine of them: TRL's signature. None: the reward does not apply."""


def text(completion: Completion) -> str:
    """Return the completion itself, or the content of its last assistant message ("" where there is none).

    A message without a role is the assistant's; of content in parts, the text parts count.
    """
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            content = message.get("content") or ""
            return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    return ""
