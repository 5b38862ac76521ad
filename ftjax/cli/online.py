"""Runs whose batches the policy writes itself: it samples, rewards judge, and so many steps are taken on what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from rich.markup import escape

from ftjax import data, logs, online
from ftjax.cli import build, judging, rollouts, show
from ftjax.cli.run import Lessons, Run
from ftjax.types import Batch, Mean, Metrics, Model, Params, TrainState, Transform

ROLLOUTS = "rollouts.jsonl"
"""In the workdir: a line for each sample that was learnt from."""


class Actor(NamedTuple):
    """The policy as it samples and is scored, without what is trained."""

    model: Model
    method: Transform
    frozen: Params


class Experiences:
    """The batches of a run that learns from its own samples: a `Loop.batch`.

    Every `rollouts.stride` steps the policy, as it is then, samples a new experience: from prompts, keys and in an order that are functions
    of the seed and the number of the experience, so that a resumed run goes on with the same bits.
    """

    def __init__(self, run: Run, actor: Actor, lessons: Lessons, *, start: int, meter: logs.Meter):
        config, model, mesh = run.config, actor.model, run.mesh
        self._run, self._actor, self._lessons, self._meter, self._asked = run, actor, lessons, meter, config.rollout
        self._sample = rollouts.sampler(config, model, mesh, lessons.encoder)
        self._judge = judging.judge(config)
        self._advantages = rollouts.advantages(config)
        temperatures = {self._asked.temperature, 1.0}
        self._policies = {one: rollouts.scorer(config, model, actor.method, mesh, temperature=one) for one in temperatures}
        self._reference = rollouts.reference_scorer(config, model, mesh) if rollouts.referred(config) else None
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
        found = online.summary(experience)
        return {name: mean.value() for name, mean in found.items() if name not in ("reward_std", "zero_variance", "sampling_seconds")}

    def _gather(self, state: TrainState, index: int, done: int) -> tuple[Batch, Metrics]:
        """Return the rows of experience `index`, sampled by the policy after `done` steps."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._run.config.seed), 2), index)
        found = self._answered(state, self._lessons.loader.at(index), key, per_prompt=self._asked.samples_per_prompt)
        p, g = found.rewards.shape
        rows, penalties, said = self._scored(state, [prompt.tokens for prompt in found.prompts for _ in range(g)], found)
        evidence = online.Evidence(
            rewards=np.nan_to_num(found.rewards),
            counted=np.isfinite(found.rewards).astype(np.float32),
            mask=rows.loss_mask.reshape(p, g, -1),
            penalties=penalties.reshape(p, g, -1),
        )
        advantages = np.asarray(self._advantages(evidence))
        self._show(found._replace(advantages=advantages), done)
        rows = dataclasses.replace(rows, advantages=advantages.reshape(p * g, *advantages.shape[2:]))
        return rows, online.summary(found) | said

    def _answered(self, state: TrainState, prompts: Sequence[data.Prompt], key: jax.Array, *, per_prompt: int) -> online.Experience:
        """Return samples of the policy and what they are worth; what they are worth beside each other is still to come."""
        asked = [prompt for prompt in prompts for _ in range(per_prompt)]
        keys = jax.random.split(key, (len(prompts), per_prompt))
        began = time.perf_counter()
        params = self._actor.method.attach(self._actor.frozen, state.trainable)
        samples = self._sample(params, [prompt.tokens for prompt in prompts], keys)
        seconds = time.perf_counter() - began
        decode = self._lessons.encoder.tokenizer.decode
        texts = [decode(sample.tokens.tolist(), skip_special_tokens=True) for sample in samples]
        judged = self._judge(asked, texts, samples)
        for failure in judged.failures[:2]:
            self._run.terminal.say(f"[yellow]not judged[/]: {escape(str(failure))} ({len(judged.failures)} in all)", markup=True)
        rewards, each = judging.as_rows(judged, (len(prompts), per_prompt))
        return online.Experience(prompts, samples, texts, rewards, each, np.zeros_like(rewards), seconds)

    def _scored(self, state: TrainState, asked: Sequence[np.ndarray], found: online.Experience) -> tuple[Batch, np.ndarray, Metrics]:
        """Return the rows of an experience with what policy and reference say of them, the penalties of their tokens, and metrics.

        They are asked as far as anyone reads it; the policy at its first experience in any case: it must say what the sampler said.
        """
        config, first = self._run.config, self._rows is None
        options = {"max_tokens": config.data.max_tokens, "mask_truncated": self._asked.mask_truncated}
        rows = online.rows(asked, found.samples, **options)
        policy = lambda temperature: self._look(partial(self._policies[temperature], state.trainable, self._actor.frozen), rows)  # noqa: E731
        said: Metrics = {}
        if first and rollouts.filtered(config):
            plain = online.rows(asked, [dataclasses.replace(one, behavior_logps=one.logps) for one in found.samples], **options)
            self._check(plain, policy(1.0))
        several = rollouts.stride(config) > 1
        if several or self._asked.kl_penalty or (first and not rollouts.filtered(config)):
            logps = policy(self._asked.temperature)
            if not rollouts.filtered(config):
                gap = self._check(rows, logps) if first else online.disagreement(rows.behavior_logps, logps, rows.loss_mask)
                said["sampler_gap"] = Mean(np.float32(gap.mean), np.float32(1))
        if self._reference:
            reference = self._look(partial(self._reference, self._actor.frozen), rows)
            rows = dataclasses.replace(rows, reference_logps=reference)
        penalties = self._asked.kl_penalty * (logps - reference) if self._asked.kl_penalty else np.zeros_like(rows.loss_mask)
        return dataclasses.replace(rows, old_logps=logps) if several else rows, penalties, said

    def _check(self, rows: Batch, logps: np.ndarray) -> online.Disagreement:
        """Return by how much sampler and trainer differ, and say so; raise where that is more than rounding."""
        gap = online.check_agreement(rows.behavior_logps, logps, rows.loss_mask, dtype=self._run.config.model.dtype)
        self._run.terminal.say(
            f"sampler and trainer agree about {int(rows.loss_mask.sum()):,} sampled tokens: {gap.mean:.1e} nats apart on average, "
            f"{gap.most:.1e} at most"
        )
        return gap

    def _look(self, score: Callable[[Batch], jax.Array], rows: Batch) -> np.ndarray:
        """Return what a scorer says of all rows, asked for as many at a time as a step learns from at a time."""
        config = self._run.config
        size = config.data.batch_size // config.data.accumulation
        parts = (jax.tree.map(lambda x, at=at: x[at : at + size], rows) for at in range(0, rows.tokens.shape[0], size))
        return np.concatenate([np.asarray(score(build.on_mesh(part, self._run.mesh))) for part in parts])

    def _show(self, found: online.Experience, done: int) -> None:
        """Write all samples to the file, and a few to the terminal where a report is due."""
        config = self._run.config
        rows = online.table(found)
        for row in rows[: self._asked.log or None]:
            self._file.row(done + 1, row)  # of the first step that learns from it: a run resumed before that step drops the line
        if self._asked.show and (self._rows is None or done % config.logging.every_steps < rollouts.stride(config)):
            self._run.terminal.say(show.rollouts(rows[: self._asked.show]))
