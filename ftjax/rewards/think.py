"""Format: whether the text stands in the tags that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text


def think_format(prompts: Sequence[Any], completions: Sequence[Completion], *, opened: bool = False, **columns: Any) -> list[float]:
    """Return 1 for each completion that starts with a `<think>`, the only one, and closes it, else 0. TRL's `think_format_reward`.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      opened: the chat template has written the `<think>` already.
      **columns: not looked at.
    """
    return [float(_thinks(("<think>" if opened else "") + text(completion))) for completion in completions]


def tag_format(
    prompts: Sequence[Any], completions: Sequence[Completion], *, tags: Sequence[str] = ("think", "answer"), **columns: Any
) -> list[float]:
    r"""Return 1 for each completion that is one block of every tag, in this order, with only white space around them, else 0.

    As open-r1's `format_reward`, which also wants each tag on a line of its own (that is `tag_count`'s concern here).

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      tags: names of tags.
      **columns: not looked at.
    """
    return [float(_is_blocks(text(completion), tags)) for completion in completions]


def tag_count(
    prompts: Sequence[Any], completions: Sequence[Completion], *, tags: Sequence[str] = ("think", "answer"), **columns: Any
) -> list[float]:
    r"""Return the share of the tags that stand exactly once and on a line of their own. open-r1's `tag_count_reward`.

    The first tag opens the text or a line, the last one ends either.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      tags: names of tags.
      **columns: not looked at.
    """
    marks = [mark for tag in tags for mark in (f"\n<{tag}>\n", f"\n</{tag}>\n")]
    if marks:
        marks[0], marks[-1] = marks[0].removeprefix("\n"), marks[-1].removesuffix("\n")
    return [sum(text(completion).count(mark) == 1 for mark in marks) / max(len(marks), 1) for completion in completions]


def block(text: str, tag: str) -> str | None:
    """Return what the last closed `<tag>` holds, stripped, or None."""
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if closed and opened else None


def _thinks(text: str) -> bool:
    rest = text.removeprefix("<think>")
    return rest != text and "<think>" not in rest and "</think>" in rest


def _is_blocks(text: str, tags: Sequence[str]) -> bool:
    if any(text.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return False
    for tag in tags:
        before, _, text = text.partition(f"<{tag}>")
        _, closed, text = text.partition(f"</{tag}>")
        if before.strip() or not closed:
            return False
    return not text.strip()
