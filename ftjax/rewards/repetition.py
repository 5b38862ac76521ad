"""Repetition: how much of a completion says again what it has said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion


def repetition(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    completion_ids: Sequence[Sequence[int]],
    ngram_tokens: int = 3,
    max_penalty: float = -1.0,
    **columns: Any,
) -> list[float]:
    """Return `max_penalty` times the share of repeated n-grams, and 0 for completions shorter than one.

    r = max_penalty (1 - unique n-grams / n-grams). Yeo et al. 2025, arXiv:2502.03373, appendix C.2, over tokens as TRL's
    `get_repetition_penalty_reward` (open-r1 counts words in lower case).

    Args:
      prompts: not looked at.
      completions: not looked at.
      completion_ids: what the model wrote, in tokens.
      ngram_tokens: n, at least 1.
      max_penalty: what a completion tends to that says one thing for ever; at most 0.
      **columns: not looked at.
    """
    if max_penalty > 0 or ngram_tokens < 1:
        raise ValueError(f"repetition: max_penalty is at most 0 and ngram_tokens at least 1, not {max_penalty} and {ngram_tokens}.")
    return [max_penalty * _repeated(tuple(ids), ngram_tokens) for ids in completion_ids]


def _repeated(ids: tuple[int, ...], n: int) -> float:
    ngrams = [ids[at : at + n] for at in range(len(ids) - n + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
