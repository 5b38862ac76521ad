"""Task vectors: how several changes of one weight become one change.

A *task vector* is what fine-tuning added to a weight, `tuned - base` (Ilharco et al. 2023, arXiv:2212.04089). The functions take several of
them for one weight, float arrays of one shape, with a factor for each, and return one in float32. NumPy: nothing here needs a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIGNS = ("total", "frequency")


def linear(vectors: Sequence[np.ndarray], factors: Sequence[float]) -> np.ndarray:
    """Return Σ f_k v_k: task arithmetic."""
    return sum((np.float32(f) * v.astype(np.float32) for v, f in zip(vectors, factors, strict=True)), np.zeros((), np.float32))


def magnitude_prune(vectors: Sequence[np.ndarray], factors: Sequence[float], *, density: float) -> np.ndarray:
    """Return Σ f_k keep(v_k), where `keep` leaves the `density` of the entries that are largest and zeroes the others."""
    return linear([_largest(v, density) for v in vectors], factors)


def ties(vectors: Sequence[np.ndarray], factors: Sequence[float], *, density: float, sign: str = "total") -> np.ndarray:
    """Trim, elect a sign for each entry, and average those that agree with it (Yadav et al. 2023, arXiv:2306.01708, algorithm 1).

    Entries that were trimmed do not count for the average. The paper trims over all weights of a model together; this function sees one
    weight, as PEFT's does.

    Args:
      vectors: of one weight.
      factors: multiply the vectors after the vote, so that a negative one still takes a task away (the paper has none).
      density: the share of entries of each vector that is kept, in (0, 1].
      sign: "total" elects the sign of the sum, as the paper; "frequency" that of the most vectors.
    """
    return _agreeing([_largest(v, density) for v in vectors], factors, sign)


def dare(vectors: Sequence[np.ndarray], factors: Sequence[float], *, density: float, random: np.random.Generator) -> np.ndarray:
    """Drop entries at random and rescale the rest by 1/density, then add (Yu et al. 2024, arXiv:2311.03099)."""
    return linear([_dropped(v, density, random) for v in vectors], factors)


def dare_ties(
    vectors: Sequence[np.ndarray], factors: Sequence[float], *, density: float, random: np.random.Generator, sign: str = "total"
) -> np.ndarray:
    """Drop and rescale as `dare`, then elect signs and average as `ties`."""
    return _agreeing([_dropped(v, density, random) for v in vectors], factors, sign)


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"merge: density is in (0, 1], the share of entries that is kept, not {density}.")


def _largest(vector: np.ndarray, density: float) -> np.ndarray:
    _check(density)
    count = int(density * vector.size)
    if count == vector.size:
        return vector
    flat = np.zeros(vector.size, np.float32)
    if count:
        keep = np.argpartition(np.abs(vector).ravel(), vector.size - count)[vector.size - count :]
        flat[keep] = vector.ravel()[keep]
    return flat.reshape(vector.shape)


def _dropped(vector: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    _check(density)
    keep = random.random(vector.shape, np.float32) < density
    return np.where(keep, vector.astype(np.float32) / np.float32(density), np.float32(0))


def _agreeing(vectors: Sequence[np.ndarray], factors: Sequence[float], sign: str) -> np.ndarray:
    if sign not in SIGNS:
        raise ValueError(f"merge: signs are elected by {' or '.join(map(repr, SIGNS))}, not {sign!r}.")
    votes = sum(vectors if sign == "total" else map(np.sign, vectors))
    elected = np.where(votes >= 0, np.float32(1), np.float32(-1))
    agree = [np.sign(v) == elected for v in vectors]
    total = linear([np.where(a, v, np.float32(0)) for a, v in zip(agree, vectors, strict=True)], factors)
    return total / np.maximum(sum(a.astype(np.float32) for a in agree), np.float32(1))
