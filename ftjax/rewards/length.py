"""Length in tokens, and a right answer worth more or less by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, Reward
from ftjax.rewards.exact import exact_match


def target_length(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    target_tokens: int,
    **columns: Any,
) -> list[float]:
    """Return how near each completion is to a number of tokens: 0 at it, -1 where it is off by as many or more.

    r = -min(1, |n - target| / target). L1's exact length control, Aggarwal & Welleck 2025, arXiv:2503.04697, with the target as the unit.

    Args:
      prompts: not looked at.
      completions: not looked at.
      completion_ids: what the model wrote, in tokens.
      target_tokens: the length wanted, at least 1.
      **columns: not looked at.
    """
    _positive("target_length", target_tokens=target_tokens)
    return [-min(1.0, abs(len(ids) - target_tokens) / target_tokens) for ids in completion_ids]


def soft_overlong(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int,
    soft_tokens: int,
    **columns: Any,
) -> list[float]:
    """Return 0 up to `max_tokens - soft_tokens`, from there down to -1 at `max_tokens`, and -1 beyond.

    Yu et al. 2025 (DAPO), arXiv:2503.14476, equation 13; TRL's `get_soft_overlong_punishment`.

    Args:
      prompts: not looked at.
      completions: not looked at.
      completion_ids: what the model wrote, in tokens.
      max_tokens: where the punishment is whole.
      soft_tokens: over how many tokens it grows; 0: all at once.
      **columns: not looked at.
    """
    _positive("soft_overlong", max_tokens=max_tokens)
    if not 0 <= soft_tokens <= max_tokens:
        raise ValueError(f"soft_overlong: soft_tokens must be between 0 and max_tokens ({max_tokens}), not {soft_tokens}.")
    over = [len(ids) - (max_tokens - soft_tokens) for ids in completion_ids]
    return [0.0 if n <= 0 else -1.0 if n >= soft_tokens else -n / soft_tokens for n in over]


def cosine(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int,
    correct: Reward = exact_match,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    **columns: Any,
) -> list[float | None]:
    """Return a reward between what an empty and what a whole-length completion gets, apart for right and wrong ones.

    r = long + (short - long) (1 + cos(π min(n / max_tokens, 1))) / 2: a right answer is best short, a wrong one least bad long.
    Yeo et al. 2025, arXiv:2502.03373, appendix C.1; TRL's `get_cosine_scaled_reward`, which stays at `long` beyond `max_tokens` too.

    Args:
      prompts: passed on.
      completions: passed on.
      completion_ids: what the model wrote, in tokens.
      max_tokens: the length at which `long` is reached.
      correct: a reward that is positive for right answers; where it does not apply, neither does this one.
      right: of a right answer, when short and when long.
      wrong: of a wrong one.
      **columns: passed on.
    """
    _positive("cosine", max_tokens=max_tokens)
    judged = correct(prompts, completions, completion_ids=completion_ids, **columns)
    scores: list[float | None] = []
    for verdict, ids in zip(judged, completion_ids, strict=True):
        short, long = right if (verdict or 0.0) > 0 else wrong
        wave = math.cos(math.pi * min(len(ids) / max_tokens, 1.0))
        scores.append(None if verdict is None else long + 0.5 * (short - long) * (1.0 + wave))
    return scores


def brevity(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    correct: Reward = exact_match,
    **columns: Any,
) -> list[float | None]:
    """Return λ = 1/2 - (n - shortest) / (longest - shortest) among the answers to one prompt; of wrong answers at most 0.

    Kimi k1.5, arXiv:2501.12599, section 2.3.3: where all are equally long, 0. open-r1's `len_reward` takes the extremes over the batch
    instead, in characters.

    Args:
      prompts: completions of equal prompts are compared with each other.
      completions: passed on.
      completion_ids: what the model wrote, in tokens.
      correct: a reward that is positive for right answers; where it does not apply, neither does this one.
      **columns: passed on.
    """
    judged = correct(prompts, completions, completion_ids=completion_ids, **columns)
    lengths: dict[str, list[int]] = {}
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        lengths.setdefault(repr(prompt), []).append(len(ids))
    scores: list[float | None] = []
    for prompt, verdict, ids in zip(prompts, judged, completion_ids, strict=True):
        shortest, longest = min(lengths[repr(prompt)]), max(lengths[repr(prompt)])
        value = 0.0 if shortest == longest else 0.5 - (len(ids) - shortest) / (longest - shortest)
        scores.append(None if verdict is None else value if verdict > 0 else min(0.0, value))
    return scores


def _positive(name: str, **counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {option} must be at least 1, not {count}.")
