"""Samples of the policy beside those of an opponent, which wrote to the same prompts: who won, and the pairs that are learnt from."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ftjax.online.experience import Experience
from ftjax.types import Batch, Mean, Metrics


def duels(policy: Batch, opponents: Batch, rewards: np.ndarray, opposed: np.ndarray) -> Batch:
    """Return each sample with its opponent's, `[n, 2, t]`, the policy's first, and as `desirable` `[n]` whether that is worth more.

    XPO's: Xie et al., 2024, arXiv 2405.21046. Where both are worth the same, or one has no reward or no token that counts, none does in
    either; TRL has such a pair won by the policy.

    Args:
      policy: the samples `[n, t]`.
      opponents: likewise, of another width perhaps.
      rewards: `[p, g]`, n of them; NaN where none applies.
      opposed: likewise, of the opponents.
    """
    width = max(policy.tokens.shape[1], opponents.tokens.shape[1])
    wide = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])))  # noqa: E731
    sides = ((x.tokens, x.loss_mask, x.positions, x.segment_ids) for x in (policy, opponents))
    tokens, mask, positions, segment_ids = (np.stack([wide(ours), wide(theirs)], axis=1) for ours, theirs in zip(*sides, strict=True))
    decided = np.isfinite(rewards) & np.isfinite(opposed) & (rewards != opposed)
    won = (np.nan_to_num(rewards) > np.nan_to_num(opposed)).astype(np.float32)
    both = (mask > 0).any(axis=-1).all(axis=-1)
    mask = mask * (decided.reshape(-1) & both)[:, None, None].astype(np.float32)
    return dataclasses.replace(Batch(tokens, mask, positions, segment_ids), desirable=won.reshape(-1))


def contest(experience: Experience) -> Metrics:
    """Return `opponent/reward`, `opponent/length` in tokens and `opponent/wins`, the share of duels that the policy won, a tie half."""
    others = experience.opponents
    known = np.isfinite(experience.rewards) & np.isfinite(others.rewards)
    wins = np.where(known, (np.sign(np.where(known, experience.rewards - others.rewards, 0)) + 1) / 2, 0)
    lengths = [len(sample.tokens) for sample in others.samples]
    found = {
        "reward": (np.nansum(others.rewards), np.isfinite(others.rewards).sum()),
        "length": (np.sum(lengths), len(lengths)),
        "wins": (wins.sum(), known.sum()),
    }
    return {f"opponent/{name}": jax.tree.map(np.float32, Mean(*values)) for name, values in found.items()}
