"""What a policy wrote to its prompts, and the rows that a scorer reads it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ftjax import rollout
from ftjax.data import Prompt
from ftjax.rollout import Engine, Request, Sample, Sampling, Stage
from ftjax.types import Batch, Params

Sampler = Callable[..., list[Sample]]
"""`(params, prompts, keys [p, g], *, greedy=False) -> samples`: g to each of p `data.Prompt`s, one prompt after the other; each depends on
its own prompt and key alone."""


def sampler(engine: Engine, *, max_tokens: int, sampling: Sampling, min_tokens: int = 0, stop: Sequence[str] = ()) -> Sampler:
    """Return how an engine answers prompts, each of which is read once.

    Args:
      engine: its slots are filled with the next sample as soon as one has ended.
      max_tokens: the most tokens of a sample.
      sampling: from `rollout.settings`.
      min_tokens: until a sample has so many, no token that would end it is drawn: `Sample.behavior_logps` are of what is left.
      stop: texts that end a sample, of which they are a part.
    """

    def sample(params: Params, prompts: Sequence[Prompt], keys: jax.Array, *, greedy: bool = False) -> list[Sample]:
        options = {"sampling": Sampling() if greedy else sampling, "num_samples": keys.shape[1], "min_tokens": min_tokens, "stop": stop}
        asked = zip(prompts, keys, strict=True)
        return engine.generate(params, [Request(prompt.tokens, max_tokens, key=key, **options) for prompt, key in asked])

    return sample


def player(stage: Stage, *, sampling: Sampling) -> Sampler:
    """Return how prompts are answered in turns with an environment: see `rollout.play`."""

    def sample(params: Params, prompts: Sequence[Prompt], keys: jax.Array, *, greedy: bool = False) -> list[Sample]:
        return rollout.play(stage, params, prompts, keys, sampling=Sampling() if greedy else sampling)

    return sample


def words(sample: Sample, decode: Callable[..., str], *, stop: Sequence[str] = (), min_tokens: int = 0) -> str:
    """Return a sample in words, up to the text that stopped it; of an episode with what the policy was told, each a line with its role."""
    if sample.episode is None:
        return rollout.shown(decode, sample.tokens, stop, min_tokens=min_tokens)
    said = sample.episode.messages
    return "\n".join(one["content"] if one["role"] == "assistant" else f"[{one['role']}] {one['content']}" for one in said)


def rows(prompts: Sequence[np.ndarray], samples: Sequence[Sample], *, max_tokens: int, mask_truncated: bool = False) -> Batch:
    """Return prompts with their completions as a batch `[n, t]` of NumPy arrays, padded on the right.

    What a policy was told between its turns is there to be read, and counts nowhere. The width is a bucket (`rollout.bucket`) of the
    longest, so that few programs are compiled.

    Args:
      prompts: int `[t]` each, one for each sample.
      samples: what was written.
      max_tokens: of a row; none is wider.
      mask_truncated: whether nothing is learnt from a completion that did not end by itself (DAPO's overlong filter).
    """
    longest = max(len(prompt) + len(sample.tokens) for prompt, sample in zip(prompts, samples, strict=True))
    shape = (len(prompts), min(rollout.bucket(longest), max_tokens))
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask = np.zeros(shape, np.float32)
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        begin, end = len(prompt), len(prompt) + len(sample.tokens)
        tokens[row, :end] = np.concatenate([prompt, sample.tokens])
        positions[row, :end] = np.arange(end)
        segment_ids[row, :end] = 1
        loss_mask[row, begin:end] = sample.drawn & (sample.finished or not mask_truncated)
    batch = Batch(tokens, loss_mask, positions, segment_ids)
    return dataclasses.replace(batch, behavior_logps=laid(batch, [sample.behavior_logps for sample in samples]))


def laid(batch: Batch, values: Sequence[np.ndarray]) -> np.ndarray:
    """Return what is known of each token of some samples in their places, float32 `[n, t]`: the last of their rows."""
    found = np.zeros(batch.tokens.shape, np.float32)
    for row, (known, end) in enumerate(zip(values, (batch.segment_ids > 0).sum(axis=1), strict=True)):
        found[row, end - len(known) : end] = known
    return found
