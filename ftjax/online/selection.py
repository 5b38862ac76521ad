"""Rejection sampling: of what the policy wrote only the good is kept, and learnt as if it had been given.

STaR, Zelikman et al., 2022, arXiv 2203.14465, and ReST, Gulcehre et al., 2023, arXiv 2308.08998, keep what is good enough; RAFT, Dong et
al., 2023, arXiv 2304.06767, keeps the best of each prompt.
"""

from __future__ import annotations

import numpy as np

from ftjax.types import Batch, Mean


def best(batch: Batch, rewards: np.ndarray, *, least: float | None = None) -> Batch:
    """Return the best sample of each prompt, `[p, t]`, the first of equals; one that is not good enough counts nowhere.

    Args:
      batch: the samples `[p · g, t]`; one of which no token counts, as it was cut, is no prompt's best.
      rewards: `[p, g]`; NaN where none applies.
      least: what a sample must be worth; None for whatever it is worth.
    """
    p, g = rewards.shape
    known = np.isfinite(rewards) & (batch.loss_mask > 0).any(axis=1).reshape(p, g)
    at = np.arange(p) * g + np.argmax(np.where(known, rewards, -np.inf), axis=1)
    return _kept(batch, at, rewards, least)


def above(batch: Batch, rewards: np.ndarray, *, least: float) -> Batch:
    """Return all samples, `[p · g, t]`, of which those count that are worth at least so much; arguments as of `best`."""
    return _kept(batch, np.arange(rewards.size), rewards, least)


def kept(batch: Batch) -> Mean:
    """Return the share of the rows, or pairs, from which something is learnt: a pair needs tokens that count in both of its samples."""
    counted = (batch.loss_mask > 0).any(axis=-1).reshape(len(batch.loss_mask), -1).all(axis=1)
    return Mean(np.float32(counted.sum()), np.float32(len(counted)))


def _kept(batch: Batch, at: np.ndarray, rewards: np.ndarray, least: float | None) -> Batch:
    worth = rewards.reshape(-1)[at]
    good = np.isfinite(worth) & (np.nan_to_num(worth) >= (-np.inf if least is None else least))
    tokens, mask, positions, segment_ids = (x[at] for x in (batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids))
    return Batch(tokens, mask * good[:, None].astype(np.float32), positions, segment_ids)
