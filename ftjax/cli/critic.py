"""A trained reward model as a function of prompts and completions, and the best of several completions by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ftjax import data, losses, rollout, scoring
from ftjax.cli import pretrained
from ftjax.types import VALUE_HEAD, Batch, Model, Params

Critic = Callable[[Sequence[rollout.Prompt], Sequence[str]], list[float]]
"""`(prompts, completions) -> rewards`: what `rewards.reward_model` takes as its `score`."""


def load(name: str, *, dtype: str = "auto", batch_size: int = 8) -> Critic:
    """Return the reward model at a name.

    Args:
      name: a classifier of one label (`ftjax export` writes one), or the workdir of a run that trained a value head, or its adapter; what
        a run trained reads conversations by the template of that run, and others by the one of their tokenizer.
      dtype: of its weights.
      batch_size: completions at a time.

    Raises:
      ValueError: it has no value head.
    """
    found = pretrained.of_name(name, dtype=dtype)
    if VALUE_HEAD not in found.params:
        raise ValueError(f"--reward: {name} is no reward model: it has no value head. `ftjax train` makes one with algorithm='reward'.")
    encoder = data.make_encoder(found.tokenizer, max_tokens=found.model.config.max_position_embeddings, **pretrained.template(found))
    return critic(found.model, found.params, encoder, batch_size=batch_size)


def critic(model: Model, params: Params, encoder: data.Encoder, *, batch_size: int = 8) -> Critic:
    """Return what a reward model says of completions: its value at the last token of the conversation, as it was trained.

    Args:
      model: the architecture.
      params: with a value head.
      encoder: of its conversations; a prompt that is too long loses its front.
      batch_size: rows at a time, which changes no reward.
    """

    @jax.jit
    def read(params: Params, batch: Batch) -> jax.Array:
        return losses.response_rewards(scoring.score(model, params, batch, outputs=("values",)), batch)

    def rewards(prompts: Sequence[rollout.Prompt], completions: Sequence[str]) -> list[float]:
        encoded = encoder.encode([_conversation(*pair) for pair in zip(prompts, completions, strict=True)])
        if wrong := [one for one in encoded if isinstance(one, data.RowError)]:
            raise ValueError(f"critic: {wrong[0]}")
        found = np.zeros(len(encoded), np.float32)
        order = sorted(range(len(encoded)), key=lambda at: len(encoded[at].tokens))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            found[chosen] = np.asarray(read(params, _padded([encoded[at].tokens for at in chosen], batch_size)))[: len(chosen)]
        return found.tolist()

    return rewards


def best(completions: Sequence[str], rewards: Sequence[float]) -> dict[str, Any]:
    """Return the completion of the highest reward, the first of them, with all rewards.

    >>> best(["a", "b", "c"], [0.5, 2.0, 1.0])
    {'completion': 'b', 'reward': 2.0, 'rewards': [0.5, 2.0, 1.0]}
    """
    at = int(np.argmax(rewards))
    return {"completion": completions[at], "reward": rewards[at], "rewards": list(rewards)}


def _conversation(prompt: rollout.Prompt, completion: str) -> data.Example:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return data.Example((*before, {"role": "assistant", "content": completion}))


def _padded(rows: Sequence[np.ndarray], count: int) -> Batch:
    """Return `[count, width]` of a few widths, so that few programs are compiled."""
    width = rollout.bucket(max(map(len, rows)))
    tokens, real = np.zeros((count, width), np.int32), np.zeros((count, width), np.int32)
    for at, row in enumerate(rows):
        tokens[at, : len(row)], real[at, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), real.shape)
    return Batch(tokens, real.astype(np.float32), positions, real)
