"""The numbers of an experience: rewards, lengths, how many groups teach nothing, and how fast it was sampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftjax.online.experience import Experience, informative
from ftjax.types import Mean, Metrics

NGRAM = 4
"""Tokens of a phrase whose second time counts as repetition."""


def summary(experience: Experience) -> Metrics:
    """Return the metrics of an experience, as means that add up with those of other experiences.

    `reward` (the weighted sum, within bounds and less what a cut sample pays) and `rewards/NAME` as they were given; `reward_std`, the
    deviation within a group; `zero_variance`, the share of groups whose samples are all worth the same; `length` in tokens that the policy
    wrote and `finished`, the share that ended by itself; `repetition`, the share of phrases of `NGRAM` tokens that were there before;
    `sampled_tokens_per_second` and `sampling_seconds`; where an environment answered, `turns` of the policy.
    """
    written = [sample.tokens[sample.drawn] for sample in experience.samples]
    lengths = np.asarray(list(map(len, written)))
    turns = [sum(one["role"] == "assistant" for one in sample.episode.messages) for sample in experience.samples if sample.episode]
    deviations = np.asarray([_deviation(group) for group in experience.rewards])
    worth = {f"rewards/{name}": _mean(values) for name, values in experience.each.items()}
    return {
        "reward": _mean(experience.rewards),
        **worth,
        "reward_std": _mean(deviations),
        "zero_variance": _mean(np.where(np.isfinite(deviations), ~informative(experience.rewards), np.nan)),
        "length": _mean(lengths),
        "finished": _mean([sample.finished for sample in experience.samples]),
        "repetition": _mean(list(map(repetition, written))),
        "sampled_tokens_per_second": _quotient(lengths.sum(), experience.seconds),
        "sampling_seconds": _quotient(experience.seconds, 1.0),
        **({"turns": _mean(turns)} if turns else {}),
    }


def repetition(tokens: np.ndarray, size: int = NGRAM) -> float:
    """Return the share of the phrases of `size` tokens that stand earlier in `tokens` too.

    >>> repetition(np.array([1, 2, 1, 2, 1]), size=2)
    0.5
    """
    phrases = [tuple(tokens[at : at + size].tolist()) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def _deviation(rewards: np.ndarray) -> float:
    """Return the deviation of the rewards of a group; NaN where fewer than two apply."""
    known = rewards[np.isfinite(rewards)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def _mean(values: Sequence[float] | np.ndarray) -> Mean:
    """Return the mean of what is not NaN."""
    values = np.asarray(values, np.float64)
    known = values[np.isfinite(values)]
    return _quotient(known.sum(), len(known))


def _quotient(total: float, weight: float) -> Mean:
    return Mean(np.float32(total), np.float32(weight))
