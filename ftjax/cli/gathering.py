"""What given weights write to the prompts of an experience, and what it is worth, before anybody learns from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.markup import escape

from ftjax import data, online
from ftjax.cli import critic, grader, judging, opponents, rollouts
from ftjax.cli.ahead import Devices
from ftjax.cli.hindsight import Actor
from ftjax.cli.run import Lessons, Run
from ftjax.rollout import Sample
from ftjax.types import Metrics, Params


class Gathered(NamedTuple):
    """An experience as it was sampled and judged."""

    found: online.Experience
    told: Metrics
    """Of what the policy does; what it learns from may be chosen."""
    greedy: np.ndarray | None
    """float32 `[p]`: what the most likely answer to each prompt is worth, where the estimator asks; NaN where no reward applies."""
    by: Params
    """What was trained of the weights that sampled it."""


class Gatherer:
    """Samples experiences and has them judged: a function of the seed, the number of an experience and the weights.

    Of a run of several processes each calls it with the same arguments: their devices sample together, each process judges its part, and
    all have the whole.
    """

    def __init__(self, run: Run, actor: Actor, lessons: Lessons, devices: Devices):
        config = run.config
        self._run, self._actor, self._lessons, self._asked, self._devices = run, actor, lessons, config.rollout, devices
        self._sample = rollouts.sampler(config, actor.model, run.mesh, lessons.encoder, going=devices.going)
        self._opponent = opponents.opponent(config, actor, run.mesh, lessons.encoder, going=devices.going)
        self._judge = judging.judge(config, load={"reward_model": critic.load, "judge_model": grader.load})
        self._judging = threading.Lock()  # a reward may keep a process or a connection, which is not to be asked twice at a time

    def __call__(self, trainable: Params, index: int) -> Gathered:
        """Return an experience."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.config.seed), 2), index)
        found = self.answered(trainable, self._lessons.loader.at(index), key, per_prompt=self._asked.samples_per_prompt)
        told = online.summary(found)
        found = self._opposed(trainable, self._filled(trainable, found, key, index), key)
        return Gathered(found, told, self._greedy(trainable, found.prompts, key), trainable)

    def answered(
        self, trainable: Params, prompts: Sequence[data.Prompt], key: jax.Array, *, per_prompt: int, greedy: bool = False
    ) -> online.Experience:
        """Return samples of the policy, or its likeliest answers, and what they are worth; beside each other, that is still to come."""
        keys = jax.random.split(key, (len(prompts), per_prompt))
        with self._devices:
            began = time.perf_counter()
            samples = self._sample(self._actor.method.attach(self._actor.frozen, trainable), prompts, keys, greedy=greedy)
            seconds = time.perf_counter() - began
        return self._judged(prompts, samples, seconds, per_prompt=per_prompt)

    def _filled(self, trainable: Params, found: online.Experience, key: jax.Array, index: int) -> online.Experience:
        """Return the experience with other prompts in the places of those that teach nothing, as far as the rounds of sampling go."""
        for round in range(1, 1 + self._asked.dynamic_rounds):
            dull = int((~online.informative(found.rewards)).sum())
            if not dull:
                break
            others = self._lessons.loader.at(index, round=round)[:dull]
            more = self.answered(trainable, others, jax.random.fold_in(key, round), per_prompt=self._asked.samples_per_prompt)
            found = online.filled(found, more)
        return found

    def _opposed(self, trainable: Params, found: online.Experience, key: jax.Array) -> online.Experience:
        """Return the experience with what the opponent wrote to its prompts, where there is one."""
        if self._opponent is None:
            return found
        keys = jax.random.split(jax.random.fold_in(key, 0), found.rewards.shape)
        with self._devices:
            began = time.perf_counter()
            samples = self._opponent(trainable, found.prompts, keys)
            seconds = time.perf_counter() - began
        return found._replace(opponents=self._judged(found.prompts, samples, seconds, per_prompt=found.rewards.shape[1]))

    def _greedy(self, trainable: Params, prompts: Sequence[data.Prompt], key: jax.Array) -> np.ndarray | None:
        if not rollouts.estimator(self._run.config).greedy:
            return None
        return self.answered(trainable, prompts, key, per_prompt=1, greedy=True).rewards[:, 0]

    def _judged(self, prompts: Sequence[data.Prompt], samples: Sequence[Sample], seconds: float, *, per_prompt: int) -> online.Experience:
        decode = self._lessons.encoder.tokenizer.decode
        ends = {"stop": rollouts.stop(self._run.config), "min_tokens": rollouts.min_tokens(self._run.config)}
        texts = [online.words(sample, decode, **ends) for sample in samples]
        asked = [prompt for prompt in prompts for _ in range(per_prompt)]
        with self._judging:
            judged = judging.divided(self._judge, asked, texts, samples, per_prompt=per_prompt)
        for failure in judged.failures[:2]:
            self._run.terminal.say(f"[yellow]not judged[/]: {escape(str(failure))} ({len(judged.failures)} in all)", markup=True)
        sums, each = judging.as_rows(judged, (len(prompts), per_prompt))
        penalty = self._asked.unfinished_penalty
        rewards = online.shaped(sums, samples, bounds=self._asked.reward_bounds, unfinished_penalty=penalty)
        return online.Experience(prompts, samples, texts, rewards, each, np.zeros_like(rewards), seconds)
