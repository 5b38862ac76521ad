"""An experience: prompts, the samples that the policy wrote to each, what they are worth, and the minibatches that are learnt from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import Prompt
from ftjax.losses import shaping
from ftjax.rollout import Sample
from ftjax.types import Batch


class Experience(NamedTuple):
    """p prompts with g samples each; sample `j` of prompt `i` is row `i · g + j`."""

    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    """p · g of them."""
    texts: Sequence[str]
    """The samples in words."""
    rewards: np.ndarray
    """float32 `[p, g]`: what each is worth in all to the one that learns, `shaped`; NaN where no reward applies."""
    each: Mapping[str, np.ndarray]
    """`{name: float32 [p, g]}`: by each reward, unweighted."""
    advantages: np.ndarray
    """float32 `[p, g]`, or `[p, g, t]` where tokens have their own."""
    seconds: float
    """That sampling took."""
    opponents: Experience | None = None
    """The samples of somebody else to the same prompts, with which these are compared, each with that in its place."""


def shaped(
    rewards: np.ndarray, samples: Sequence[Sample], *, bounds: tuple[float, float] | None = None, unfinished_penalty: float = 0.0
) -> np.ndarray:
    """Return the rewards `[p, g]` within bounds, less a penalty for samples that were cut; NaN stays NaN.

    Args:
      rewards: `[p, g]`, weighted sums.
      samples: p · g of them.
      bounds: the least and the largest reward; None for none.
      unfinished_penalty: ≥ 0: TRL's PPO knows it as the penalty for a missing EOS.
    """
    finished = jnp.asarray([sample.finished for sample in samples]).reshape(rewards.shape)
    rewards = rewards if bounds is None else shaping.clip_rewards(rewards, low=bounds[0], high=bounds[1])
    return np.asarray(shaping.less_unfinished(rewards, finished, penalty=unfinished_penalty), np.float32)


def minibatch(batch: Batch, *, seed: int, index: int, step: int, count: int) -> Batch:
    """Return the rows that step `step` of an experience learns from: every row comes once in `count` steps, in another order each time.

    At the first step the policy is still the one that `old_logps` are of. There they are NaN: it is asked itself, its ratio is exactly 1.

    Args:
      batch: of the whole experience, `[n, …]`.
      seed: of the order.
      index: of the experience.
      step: within it, from 0.
      count: minibatches of an epoch; must divide n.
    """
    if step == 0 and batch.old_logps is not None:
        batch = dataclasses.replace(batch, old_logps=np.full_like(batch.old_logps, np.nan))
    if count == 1:
        return batch
    epoch, part = divmod(step, count)
    n = batch.tokens.shape[0]
    order = np.random.default_rng([seed % 2**63, index, epoch]).permutation(n)
    chosen = order[part * (n // count) : (part + 1) * (n // count)]
    return jax.tree.map(lambda x: x[chosen], batch)


def informative(rewards: np.ndarray) -> np.ndarray:
    """Return bool `[p]`: the samples of a prompt are not all worth the same, so that they teach something."""
    known = np.isfinite(rewards)
    return np.max(np.where(known, rewards, -np.inf), axis=1) > np.min(np.where(known, rewards, np.inf), axis=1)


def filled(experience: Experience, more: Experience) -> Experience:
    """Return the experience with informative groups of another in the places of those that are not, as far as there are some.

    Dynamic sampling: DAPO, Yu et al., 2025, arXiv 2503.14476, section 3.2.
    """
    g, groups = experience.rewards.shape[1], [(experience, i) for i in range(len(experience.prompts))]
    fresh = iter(np.flatnonzero(informative(more.rewards)).tolist())
    for place, taken in zip(np.flatnonzero(~informative(experience.rewards)).tolist(), fresh, strict=False):
        groups[place] = (more, taken)
    of_samples = lambda name: [one for found, i in groups for one in getattr(found, name)[i * g : (i + 1) * g]]  # noqa: E731
    stacked = lambda read: np.stack([read(found)[i] for found, i in groups])  # noqa: E731
    return Experience(
        [found.prompts[i] for found, i in groups],
        of_samples("samples"),
        of_samples("texts"),
        stacked(lambda found: found.rewards),
        {name: stacked(lambda found, name=name: found.each[name]) for name in experience.each},
        stacked(lambda found: found.advantages),
        experience.seconds + more.seconds,
    )


def pairs(batch: Batch, rewards: np.ndarray) -> Batch:
    """Return the best sample of each prompt with its worst, `[p, 2, t]`, best first; where both are worth the same no token counts.

    Args:
      batch: the samples `[p · g, t]`; one of which no token counts, as it was cut, is neither.
      rewards: `[p, g]`; NaN where none applies.
    """
    p, g = rewards.shape
    known = np.isfinite(rewards) & (batch.loss_mask > 0).any(axis=1).reshape(p, g)
    best, worst = (np.argmax(np.where(known, sign * rewards, -np.inf), axis=1) for sign in (1, -1))
    at = np.arange(p)[:, None] * g + np.stack([best, worst], axis=1)
    worth = np.nan_to_num(rewards.reshape(-1)[at])
    differ = (worth[:, :1] > worth[:, 1:]) & known.reshape(-1)[at]
    tokens, mask, positions, segment_ids = (x[at] for x in (batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids))
    return Batch(tokens, mask * differ[..., None].astype(np.float32), positions, segment_ids)


def table(experience: Experience) -> list[dict[str, Any]]:
    """Return a row of plain data for each sample: prompt, completion, each reward, what it is worth in all, advantage, an episode's turns.

    Where tokens have advantages of their own it is the mean over those that the policy wrote.
    """
    (p, g), found = experience.rewards.shape, []
    written = np.asarray([sample.drawn.sum() for sample in experience.samples]).reshape(p, g)
    advantages = experience.advantages
    advantages = advantages if advantages.ndim == 2 else advantages.sum(axis=2) / np.maximum(written, 1)
    for row, (sample, text) in enumerate(zip(experience.samples, experience.texts, strict=True)):
        i, j = divmod(row, g)
        each = {name: _number(values[i, j]) for name, values in experience.each.items()}
        worth = {"reward": _number(experience.rewards[i, j]), "advantage": _number(advantages[i, j])}
        size = {"length": int(sample.drawn.sum()), "finished": sample.finished}
        if sample.episode is not None:
            size["turns"] = [dict(message) for message in sample.episode.messages]
        found.append({"prompt": experience.prompts[i].text, "completion": text, "rewards": each, **worth, **size})
        if (others := experience.opponents) is not None:
            found[-1]["opponent"] = {"completion": others.texts[row], "reward": _number(others.rewards[i, j])}
    return found


def _number(value: np.floating) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
