"""Runs whose batches the policy writes itself: it samples, rewards judge, and so many steps are taken on what came of it."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from ftjax import logs, online, sharding
from ftjax.cli import ahead, panel, rollouts, show
from ftjax.cli.gathering import Gathered, Gatherer
from ftjax.cli.hindsight import Actor, Scorer
from ftjax.cli.leash import Leash
from ftjax.cli.loop import Memory
from ftjax.cli.run import Lessons, Run
from ftjax.types import Batch, Mean, Metrics, TrainState

ROLLOUTS = "rollouts.jsonl"
"""In the workdir: a line for each sample that was learnt from."""


class Experiences:
    """The batches of a run that learns from its own samples: a `Loop.batch`.

    Every `rollouts.stride` steps comes a new experience, which the policy sampled as it is then, or as it was `rollout.staleness`
    experiences before (`ahead`): from prompts, keys and in an order that are functions of the seed and the number of the experience, so
    that a resumed run goes on with the same bits.
    """

    def __init__(self, run: Run, actor: Actor, lessons: Lessons, past: ahead.Past, *, start: int, meter: logs.Meter, memory: Memory):
        config = run.config
        self._run, self._actor, self._lessons, self._meter, self._asked = run, actor, lessons, meter, config.rollout
        devices = ahead.Devices()
        self._gatherer = Gatherer(run, actor, lessons, devices)
        options = {"count": config.steps // rollouts.stride(config), "devices": devices, "beside": run.mesh.size == 1}
        self._ahead = ahead.Ahead(self._gatherer, past, **options)
        self._score, self._worth, self._leash = Scorer(run, actor), rollouts.advantages(config), Leash(config, memory.kl_coefs)
        self._rows_of = rollouts.rows_of(config)
        self._file = logs.Jsonl(run.workdir / ROLLOUTS, resume_step=start) if jax.process_index() == 0 else None
        self._bound, self._rows = len(past), None

    def __call__(self, state: TrainState, done: int) -> tuple[Batch, Metrics]:
        """Return the batch after `done` steps, and what there is to say of its experience if that is new."""
        index, step = divmod(done, rollouts.stride(self._run.config))
        origin: Metrics = {}
        if step == 0 or self._rows is None:  # None in the middle: the run goes on after steps that were not finite
            jax.block_until_ready(state)
            with self._meter.paused():
                began = time.perf_counter()
                gathered = self._ahead(state.trainable, index)
                waited = time.perf_counter() - began
                self._rows, origin = self._lesson(state, gathered, index, done)
            if self._bound:
                origin |= {"staleness": _one(min(self._bound, index)), "waiting_seconds": _one(waited)}
        order = {"seed": self._run.config.seed, "index": index, "step": step, "count": self._asked.minibatches}
        return sharding.own_rows(online.minibatch(self._rows, **order), self._run.mesh), origin

    def close(self) -> None:
        """End what is sampled ahead, and close the file of rollouts."""
        self._ahead.close()
        if self._file:
            self._file.close()

    def stored(self, state: TrainState) -> TrainState:
        """Return what a checkpoint holds: the state, and the weights that sample what is on its way."""
        return ahead.with_past(state, self._ahead.past, bound=self._bound)

    def examine(self, state: TrainState) -> dict[str, float]:
        """Return the metrics of held-out prompts, each answered once: with the same draws at every evaluation."""
        held_out, batches = self._lessons.held_out, self._run.config.eval.batches
        prompts = held_out.prompts if not batches else [prompt for index in range(batches) for prompt in held_out.at(index)]
        key = jax.random.key(self._run.config.seed)
        experience = self._gatherer.answered(state.trainable, prompts[: len(held_out.prompts)], key, per_prompt=1)
        no_groups = ("reward_std", "zero_variance", "sampling_seconds", "sampled_tokens_per_second")
        return {name: mean.value() for name, mean in online.summary(experience).items() if name not in no_groups}

    def _lesson(self, state: TrainState, gathered: Gathered, index: int, done: int) -> tuple[Batch, Metrics]:
        """Return the rows of experience `index`, as the policy after `done` steps learns from them."""
        found, told = gathered.found, gathered.told
        p, g = found.rewards.shape
        options = {"max_tokens": self._run.config.data.max_tokens, "mask_truncated": self._asked.mask_truncated}
        asked = [prompt.tokens for prompt in found.prompts for _ in range(g)]
        rows = online.rows(asked, found.samples, **options)
        rewards, opposed, greedy = found.rewards, found.opponents and found.opponents.rewards, gathered.greedy
        known = np.isfinite(rewards) & (opposed is None or np.isfinite(opposed)) & (greedy is None or np.isfinite(greedy)[:, None])
        # A sample without a reward teaches nothing, and no coefficient of the loss pulls at it.
        rows = dataclasses.replace(rows, loss_mask=rows.loss_mask * known.reshape(-1, 1))
        seen = self._score(state, rows, found.samples, by=gathered.by if min(self._bound, index) else None)
        groups = lambda x: None if x is None else x.reshape(p, g, -1)  # noqa: E731
        evidence = online.Evidence(
            rewards=np.nan_to_num(rewards),
            counted=known.astype(np.float32),
            mask=groups(rows.loss_mask),
            kl=groups(seen.kl),
            kl_coef=np.float32(self._leash.coef(index)),
            greedy=None if greedy is None else np.nan_to_num(greedy),
            values=groups(seen.rows.old_values),
            opponents=None if opposed is None else np.nan_to_num(opposed),
            each=np.stack(list(found.each.values())),
            weights=np.asarray([panel.weights(self._run.config)[name] for name in found.each], np.float32),
        )
        worth = jax.device_get(self._worth(evidence))
        self._show(found._replace(advantages=worth["advantages"]), done)
        told = told | seen.metrics
        if self._asked.kl_penalty:
            told |= self._leash.follow(index, seen.kl.sum(axis=1), rows.loss_mask.any(axis=1))
        if found.opponents is not None:
            told |= online.contest(found)
        if self._rows_of is not None:
            rows = self._rows_of(rows, np.where(np.isfinite(rewards), np.asarray(evidence.whole), np.nan))
            return rows, told | {"kept": online.kept(rows)}
        if rollouts.paired(self._run.config):
            return online.duels(rows, online.rows(asked, found.opponents.samples, **options), rewards, opposed), told
        fields = {name: x.reshape(p * g, *x.shape[2:]) for name, x in worth.items()}
        rows = dataclasses.replace(seen.rows, **fields)
        return online.together(rows, g) if self._run.config.data.packing == "shared" else rows, told

    def _show(self, found: online.Experience, done: int) -> None:
        """Write all samples to the file, and a few to the terminal where a report is due."""
        config = self._run.config
        rows = online.table(found)
        for row in rows[: self._asked.log or None] if self._file else ():
            self._file.row(done + 1, row)  # of the first step that learns from it: a run resumed before that step drops the line
        if self._asked.show and (self._rows is None or done % config.logging.every_steps < rollouts.stride(config)):
            self._run.terminal.say(show.rollouts(rows[: self._asked.show]))


def _one(value: float) -> Mean:
    return Mean(np.float32(value), np.float32(1))
