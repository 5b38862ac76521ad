"""What a policy wrote to its prompts, and the rows that a scorer reads it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ftjax import rollout
from ftjax.types import Batch, Model, Params


class Sample(NamedTuple):
    """One completion."""

    tokens: np.ndarray
    """int32 `[n]`, the end-of-sequence token included."""
    logps: np.ndarray
    """float32 `[n]`: under the model, at temperature 1 and unfiltered."""
    behavior_logps: np.ndarray
    """float32 `[n]`: under the distribution that was drawn from."""
    finished: bool
    """It ended by itself and was not cut."""


Sampler = Callable[[Params, Sequence[np.ndarray], jax.Array], list[Sample]]
"""`(params, prompts int [t] each, keys [n]) -> samples`, in the order of the prompts; each depends on its own prompt and key alone."""


def static_sampler(
    model: Model, *, eos_ids: Sequence[int], max_tokens: int, sampling: rollout.Sampling, slots: int = 0, whole: Callable = np.asarray
) -> Sampler:
    """Return a sampler that writes batches of `slots` rows, each until its last row has ended.

    Args:
      model: the architecture.
      eos_ids: tokens that end a completion.
      max_tokens: the most tokens of one.
      sampling: from `rollout.settings`.
      slots: rows at a time; 0 for all.
      whole: brings an array to the host.
    """

    def sample(params: Params, prompts: Sequence[np.ndarray], keys: jax.Array) -> list[Sample]:
        size = min(slots, len(prompts)) or len(prompts)
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        found: dict[int, Sample] = {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            tokens, segment_ids = rollout.pad([prompts[at] for at in chosen], rows=size)
            own = keys[np.asarray([*chosen, *[chosen[0]] * (size - len(chosen))])]
            state = rollout.start(
                model, params, tokens, segment_ids, max_tokens=max_tokens, eos_ids=eos_ids, sampling=sampling, key=own
            )  # fmt: skip
            state = rollout.extend(model, params, state, max_tokens - 1, eos_ids=eos_ids, sampling=sampling)
            written, logps, behavior, lengths, finished = map(
                whole, (state.tokens, state.logps, state.behavior_logps, state.lengths, state.finished)
            )
            for row, at in enumerate(chosen):
                n = int(lengths[row])
                found[at] = Sample(written[row, :n], logps[row, :n], behavior[row, :n], bool(finished[row]))
        return [found[at] for at in range(len(prompts))]

    return sample


def rows(prompts: Sequence[np.ndarray], samples: Sequence[Sample], *, max_tokens: int, mask_truncated: bool = False) -> Batch:
    """Return prompts with their completions as a batch `[n, t]` of NumPy arrays, padded on the right.

    The width is a bucket (`rollout.bucket`) of the longest, so that few programs are compiled.

    Args:
      prompts: int `[t]` each, one for each sample.
      samples: what was written.
      max_tokens: of a row; none is wider.
      mask_truncated: whether nothing is learnt from a completion that did not end by itself (DAPO's overlong filter).
    """
    longest = max(len(prompt) + len(sample.tokens) for prompt, sample in zip(prompts, samples, strict=True))
    shape = (len(prompts), min(rollout.bucket(longest), max_tokens))
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask, behavior_logps = (np.zeros(shape, np.float32) for _ in range(2))
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        begin, end = len(prompt), len(prompt) + len(sample.tokens)
        tokens[row, :end] = np.concatenate([prompt, sample.tokens])
        positions[row, :end] = np.arange(end)
        segment_ids[row, :end] = 1
        loss_mask[row, begin:end] = sample.finished or not mask_truncated
        behavior_logps[row, begin:end] = sample.behavior_logps
    return Batch(tokens, loss_mask, positions, segment_ids, behavior_logps=behavior_logps)
