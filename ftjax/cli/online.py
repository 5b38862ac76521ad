"""Runs whose batches the policy writes itself: it samples, rewards judge, and so many steps are taken on what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from rich.markup import escape

from ftjax import data, logs, online
from ftjax.cli import critic, judging, opponents, rollouts, show
from ftjax.cli.hindsight import Actor, Scorer
from ftjax.cli.leash import Leash
from ftjax.cli.loop import Memory
from ftjax.cli.run import Lessons, Run
from ftjax.rollout import Sample
from ftjax.types import Batch, Metrics, TrainState

ROLLOUTS = "rollouts.jsonl"
"""In the workdir: a line for each sample that was learnt from."""


class Experiences:
    """The batches of a run that learns from its own samples: a `Loop.batch`.

    Every `rollouts.stride` steps the policy, as it is then, samples a new experience: from prompts, keys and in an order that are functions
    of the seed and the number of the experience, so that a resumed run goes on with the same bits.
    """

    def __init__(self, run: Run, actor: Actor, lessons: Lessons, *, start: int, meter: logs.Meter, memory: Memory):
        config = run.config
        self._run, self._actor, self._lessons, self._meter, self._asked = run, actor, lessons, meter, config.rollout
        self._sample = rollouts.sampler(config, actor.model, run.mesh, lessons.encoder)
        self._judge, self._score, self._worth = judging.judge(config, load=critic.load), Scorer(run, actor), rollouts.advantages(config)
        self._opponent, self._leash = opponents.opponent(config, actor, run.mesh, lessons.encoder), Leash(config, memory.kl_coefs)
        self._rows_of = rollouts.rows_of(config)
        self._file = logs.Jsonl(run.workdir / ROLLOUTS, resume_step=start)
        self._rows: Batch | None = None

    def __call__(self, state: TrainState, done: int) -> tuple[Batch, Metrics]:
        """Return the batch after `done` steps, and what there is to say of its experience if that is new."""
        index, step = divmod(done, rollouts.stride(self._run.config))
        origin: Metrics = {}
        if step == 0 or self._rows is None:  # None in the middle: the run goes on after steps that were not finite
            jax.block_until_ready(state)
            with self._meter.paused():
                self._rows, origin = self._gather(state, index, done)
        order = {"seed": self._run.config.seed, "index": index, "step": step, "count": self._asked.minibatches}
        return online.minibatch(self._rows, **order), origin

    def close(self) -> None:
        """Close the file of rollouts."""
        self._file.close()

    def examine(self, state: TrainState) -> dict[str, float]:
        """Return the metrics of held-out prompts, each answered once: with the same draws at every evaluation."""
        held_out, batches = self._lessons.held_out, self._run.config.eval.batches
        prompts = held_out.prompts if not batches else [prompt for index in range(batches) for prompt in held_out.at(index)]
        experience = self._answered(state, prompts[: len(held_out.prompts)], jax.random.key(self._run.config.seed), per_prompt=1)
        no_groups = ("reward_std", "zero_variance", "sampling_seconds", "sampled_tokens_per_second")
        return {name: mean.value() for name, mean in online.summary(experience).items() if name not in no_groups}

    def _gather(self, state: TrainState, index: int, done: int) -> tuple[Batch, Metrics]:
        """Return the rows of experience `index`, sampled by the policy after `done` steps."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.config.seed), 2), index)
        found = self._answered(state, self._lessons.loader.at(index), key, per_prompt=self._asked.samples_per_prompt)
        told = online.summary(found)  # of what the policy does; what it learns from may be chosen
        found = self._opposed(state, self._filled(state, found, key, index), key)
        p, g = found.rewards.shape
        options = {"max_tokens": self._run.config.data.max_tokens, "mask_truncated": self._asked.mask_truncated}
        asked = [prompt.tokens for prompt in found.prompts for _ in range(g)]
        rows = online.rows(asked, found.samples, **options)
        seen = self._score(state, rows, found.samples)
        shaped = partial(online.shaped, bounds=self._asked.reward_bounds, unfinished_penalty=self._asked.unfinished_penalty)
        rewards, opposed = shaped(found), found.opponents and shaped(found.opponents)
        groups = lambda x: None if x is None else x.reshape(p, g, -1)  # noqa: E731
        evidence = online.Evidence(
            rewards=np.nan_to_num(rewards),
            counted=(np.isfinite(rewards) & (opposed is None or np.isfinite(opposed))).astype(np.float32),
            mask=groups(rows.loss_mask),
            kl=groups(seen.kl),
            kl_coef=np.float32(self._leash.coef(index)),
            greedy=self._greedy(state, found.prompts, key),
            values=groups(seen.rows.old_values),
            opponents=None if opposed is None else np.nan_to_num(opposed),
        )
        worth = jax.device_get(self._worth(evidence))
        self._show(found._replace(advantages=worth["advantages"]), done)
        told |= seen.metrics
        if self._asked.kl_penalty:
            told |= self._leash.follow(index, seen.kl.sum(axis=1))
        if found.opponents is not None:
            told |= online.contest(found)
        if self._rows_of is not None:
            rows = self._rows_of(rows, np.where(np.isfinite(rewards), np.asarray(evidence.whole), np.nan))
            return rows, told | {"kept": online.kept(rows)}
        if rollouts.paired(self._run.config):
            return online.duels(rows, online.rows(asked, found.opponents.samples, **options), rewards, opposed), told
        fields = {name: x.reshape(p * g, *x.shape[2:]) for name, x in worth.items()}
        return dataclasses.replace(seen.rows, **fields), told

    def _filled(self, state: TrainState, found: online.Experience, key: jax.Array, index: int) -> online.Experience:
        """Return the experience with other prompts in the places of those that teach nothing, as far as the rounds of sampling go."""
        for round in range(1, 1 + self._asked.dynamic_rounds):
            dull = int((~online.informative(found.rewards)).sum())
            if not dull:
                break
            others = self._lessons.loader.at(index, round=round)[:dull]
            more = self._answered(state, others, jax.random.fold_in(key, round), per_prompt=self._asked.samples_per_prompt)
            found = online.filled(found, more)
        return found

    def _opposed(self, state: TrainState, found: online.Experience, key: jax.Array) -> online.Experience:
        """Return the experience with what the opponent wrote to its prompts, where there is one."""
        if self._opponent is None:
            return found
        keys = jax.random.split(jax.random.fold_in(key, 0), found.rewards.shape)
        began = time.perf_counter()
        samples = self._opponent(state.trainable, found.prompts, keys)
        others = self._judged(found.prompts, samples, time.perf_counter() - began, per_prompt=found.rewards.shape[1])
        return found._replace(opponents=others)

    def _answered(
        self, state: TrainState, prompts: Sequence[data.Prompt], key: jax.Array, *, per_prompt: int, greedy: bool = False
    ) -> online.Experience:
        """Return samples of the policy, or its likeliest answers, and what they are worth; beside each other, that is still to come."""
        keys = jax.random.split(key, (len(prompts), per_prompt))
        began = time.perf_counter()
        params = self._actor.method.attach(self._actor.frozen, state.trainable)
        samples = self._sample(params, prompts, keys, greedy=greedy)
        seconds = time.perf_counter() - began
        return self._judged(prompts, samples, seconds, per_prompt=per_prompt)

    def _greedy(self, state: TrainState, prompts: Sequence[data.Prompt], key: jax.Array) -> np.ndarray | None:
        """Return what the most likely answer to each prompt is worth, `[p]`, where the estimator asks; 0 where no reward applies."""
        if not rollouts.estimator(self._run.config).greedy:
            return None
        return np.nan_to_num(self._answered(state, prompts, key, per_prompt=1, greedy=True).rewards[:, 0])

    def _judged(self, prompts: Sequence[data.Prompt], samples: Sequence[Sample], seconds: float, *, per_prompt: int) -> online.Experience:
        decode = self._lessons.encoder.tokenizer.decode
        texts = [online.words(sample, decode) for sample in samples]
        judged = self._judge([prompt for prompt in prompts for _ in range(per_prompt)], texts, samples)
        for failure in judged.failures[:2]:
            self._run.terminal.say(f"[yellow]not judged[/]: {escape(str(failure))} ({len(judged.failures)} in all)", markup=True)
        rewards, each = judging.as_rows(judged, (len(prompts), per_prompt))
        return online.Experience(prompts, samples, texts, rewards, each, np.zeros_like(rewards), seconds)

    def _show(self, found: online.Experience, done: int) -> None:
        """Write all samples to the file, and a few to the terminal where a report is due."""
        config = self._run.config
        rows = online.table(found)
        for row in rows[: self._asked.log or None]:
            self._file.row(done + 1, row)  # of the first step that learns from it: a run resumed before that step drops the line
        if self._asked.show and (self._rows is None or done % config.logging.every_steps < rollouts.stride(config)):
            self._run.terminal.say(show.rollouts(rows[: self._asked.show]))
