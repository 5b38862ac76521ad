"""Sampler and trainer must say the same of the same tokens: where they do not, what is learnt is not what was sampled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOLERANCE = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 2.0)}
"""`{dtype of the activations: (mean, most)}` in nats a token. A cache and a full pass round differently; a wrong position, mask, adapter or
temperature shows as tenths of nats on average."""


class Disagreement(NamedTuple):
    """Of log-probabilities over sampled tokens, in nats."""

    mean: float
    most: float


def disagreement(sampled: np.ndarray, scored: np.ndarray, mask: np.ndarray) -> Disagreement:
    """Return by how much two statements of the same tokens differ where `mask` is 1; infinitely where one is not finite."""
    gaps = np.abs(np.asarray(sampled, np.float64) - np.asarray(scored, np.float64))[np.asarray(mask) > 0]
    gaps = np.where(np.isfinite(gaps), gaps, np.inf)
    return Disagreement(float(gaps.mean()), float(gaps.max())) if gaps.size else Disagreement(0.0, 0.0)


def check_agreement(sampled: np.ndarray, scored: np.ndarray, mask: np.ndarray, *, dtype: str) -> Disagreement:
    """Return the disagreement of sampler and trainer.

    Args:
      sampled: float `[b, t]`: what the sampler said of its tokens.
      scored: float `[b, t]`: what the trainer says of them, at the same temperature.
      mask: `[b, t]`: 1 where a token was sampled.
      dtype: of the activations, a key of `TOLERANCE`.

    Raises:
      ValueError: it is more than rounding explains.
    """
    found, (mean, most) = disagreement(sampled, scored, mask), TOLERANCE[dtype]
    if found.mean > mean or found.most > most:
        raise ValueError(
            f"rollout: the sampler and the trainer disagree about the sampled tokens by {found.mean:.2g} nats on average and "
            f"{found.most:.2g} at most, where rounding in {dtype} explains {mean:g} and {most:g}: what would be learnt is not what was "
            "sampled. The first suspects are a method that acts in one of the two alone (dropout, noise), positions or masks of a model of "
            "your own, and weights that were not the same. model.dtype='float32' shows whether it is rounding."
        )
    return found
