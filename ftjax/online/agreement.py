"""Sampler and trainer must say the same of the same tokens: where they do not, what is learnt is not what was sampled."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from ftjax.types import Batch

TOLERANCE = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 2.0)}
"""`{dtype of the activations: (mean, most)}` in nats a token. A cache and a full pass round differently; a wrong position, mask, adapter or
temperature shows as tenths of nats on average, if the model has much to say."""
TIMES = 2.0
"""How far the two may be apart on average where it is known what rounding comes to, in units of that. They were 0.84, 1.0 and 0.94 apart in
bfloat16 for two tiny models and SmolLM2-135M."""
LEAST = 4e-3
"""A difference that is let pass however little rounding comes to: a model fresh from its initializer hardly looks at positions."""


class Disagreement(NamedTuple):
    """Of log-probabilities over sampled tokens, in nats."""

    mean: float
    most: float


def disagreement(sampled: np.ndarray, scored: np.ndarray, mask: np.ndarray) -> Disagreement:
    """Return by how much two statements of the same tokens differ where `mask` is 1; infinitely where one is not finite."""
    gaps = _gaps(sampled, scored, mask)
    return Disagreement(float(gaps.mean()), float(gaps.max())) if gaps.size else Disagreement(0.0, 0.0)


def moved(batch: Batch) -> Batch:
    """Return the batch one position later: the same to a model that looks at distances, to which it rounds differently in bfloat16."""
    return dataclasses.replace(batch, positions=batch.positions + 1)


def check_agreement(
    sampled: np.ndarray, scored: np.ndarray, mask: np.ndarray, *, dtype: str, again: np.ndarray | None = None
) -> Disagreement:
    """Return the disagreement of sampler and trainer.

    What rounding comes to in bfloat16 differs fifty-fold from model to model, so a bound for all of them lets faults of most pass: with
    `again` it is measured, as the difference that `moved` makes to the trainer. Where a model makes none, or looks at absolute positions,
    `TOLERANCE` alone decides.

    Args:
      sampled: float `[b, t]`: what the sampler said of its tokens.
      scored: float `[b, t]`: what the trainer says of them, at the same temperature.
      mask: `[b, t]`: 1 where a token was sampled.
      dtype: of the activations, a key of `TOLERANCE`.
      again: float `[b, t]`: what the trainer says of them `moved`.

    Raises:
      ValueError: it is more than rounding explains.
    """
    found, (mean, most) = disagreement(sampled, scored, mask), TOLERANCE[dtype]
    if again is not None:
        mean = min(mean, max(LEAST, _explained(again, scored, mask)))
    if found.mean > mean or found.most > most:
        raise ValueError(
            f"rollout: the sampler and the trainer disagree about the sampled tokens by {found.mean:.2g} nats on average and "
            f"{found.most:.2g} at most, where rounding in {dtype} explains {mean:.2g} and {most:g}: what would be learnt is not what was "
            "sampled. The first suspects are a method that acts in one of the two alone (dropout, noise), positions or masks of a model of "
            "your own, and weights that were not the same. model.dtype='float32' shows whether it is rounding."
        )
    return found


def _explained(again: np.ndarray, scored: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean that rounding explains: `TIMES` what it came to, and more where few tokens say what that is."""
    gaps = _gaps(again, scored, mask)
    if not gaps.any() or not np.isfinite(gaps).all():
        return np.inf
    tokens = gaps.sum() ** 2 / (gaps**2).sum()  # as many as if all rounded alike: of sure tokens there is nothing to round
    return float(gaps.mean() * (TIMES + 4 / np.sqrt(tokens)))


def _gaps(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> np.ndarray:
    gaps = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))[np.asarray(mask) > 0]
    return np.where(np.isfinite(gaps), gaps, np.inf)
