"""What a policy writes to prompts, what it is worth, and how far it is from where it began."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from ftjax import rollout, scoring
from ftjax.cli import pretrained
from ftjax.hf import load as hf_load
from ftjax.online.samples import rows, words
from ftjax.rewards.sentiment import sentiment
from ftjax.types import Params

MOST = 40
"""Tokens of a completion, as in configs/ppo_smollm2_reviews.py."""
ROWS = 64


class Written(NamedTuple):
    """The completions of each prompt, one prompt's after the other's."""

    texts: list[str]
    rewards: np.ndarray
    """The known reward of each."""
    logratios: np.ndarray
    """log π(y | x) - log π_start(y | x) of each, whose mean is the divergence KL(π ‖ π_start) of a completion."""


class Start:
    """The model that every policy begins from."""

    def __init__(self, name: str):
        self.found = hf_load.load(name, dtype="bfloat16")
        self.encoder = rollout.Encoder(self.found.model, self.found.tokenizer, template="none")
        self._score = jax.jit(functools.partial(scoring.score, self.found.model, outputs=("logps",)))

    def policy(self, workdir: str) -> Params:
        """Return the parameters with the adapter of a run on them."""
        return pretrained.attach(self.found.model, self.found.params, pretrained.adapter_folder(workdir))

    def write(self, params: Params, prompts: Sequence[str], *, samples: int, seed: int) -> Written:
        """Return samples of each prompt, at temperature 1."""
        tokens = [self.encoder.encode(prompt) for prompt in prompts]
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        options = {"sampling": rollout.settings(temperature=1.0), "num_samples": samples}
        requests = [rollout.Request(prompt, MOST, key=key, **options) for prompt, key in zip(tokens, keys, strict=True)]
        engine = rollout.Engine(self.found.model, self.encoder.eos_ids, slots=ROWS)
        found = engine.generate(params, requests)
        repeated = [prompt for prompt in tokens for _ in range(samples)]
        texts = [words(sample, self.found.tokenizer.decode) for sample in found]
        mine, start = (self._logps(of, repeated, found) for of in (params, self.found.params))
        return Written(texts, np.array(sentiment([], texts)), mine - start)

    def _logps(self, params: Params, prompts: Sequence[np.ndarray], samples: Sequence[rollout.Sample]) -> np.ndarray:
        parts = []
        for first in range(0, len(samples), ROWS):
            chosen = slice(first, first + ROWS)
            batch = rows(prompts[chosen], samples[chosen], max_tokens=128)
            parts.append(np.asarray((self._score(params, batch).logps * batch.loss_mask).sum(axis=-1)))
        return np.concatenate(parts)
