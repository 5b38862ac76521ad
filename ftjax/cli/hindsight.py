"""What policy and reference say of samples before the first step on them; and whether the sampler had said the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import online, sharding
from ftjax.cli import build, rollouts
from ftjax.cli.run import Run
from ftjax.rollout import Sample
from ftjax.types import Batch, Mean, Metrics, Model, Params, Scores, TrainState, Transform


class Actor(NamedTuple):
    """The policy as it samples and is scored, without what is trained."""

    model: Model
    method: Transform
    frozen: Params


class Hindsight(NamedTuple):
    """Of an experience."""

    rows: Batch
    """With what a loss reads: `old_logps`, `old_values` and `reference_logps` as far as it does."""
    kl: np.ndarray
    """float32 `[n, t]`: the divergence of the policy from its reference as `rollout.kl_estimator` has it, on tokens that count; 0 where
    nothing is taken from the reward for it."""
    metrics: Metrics


class Scorer:
    """Scores the rows of experiences; at the first one it compares trainer and sampler, and refuses to go on where they differ."""

    def __init__(self, run: Run, actor: Actor):
        config, self._run, self._actor = run.config, run, actor
        ratios = not rollouts.paired(config) and not rollouts.selected(config)  # of the policy to itself when it sampled
        self._filtered, self._several = rollouts.filtered(config), rollouts.stride(config) > 1 and ratios
        self._valued, self._penalised = rollouts.estimator(config).values, bool(config.rollout.kl_penalty)
        self._policies = {
            temperature: rollouts.scorer(config, actor.model, actor.method, run.mesh, temperature=temperature)
            for temperature in {config.rollout.temperature, 1.0}
        }
        self._reference = rollouts.reference_scorer(config, actor.model, run.mesh) if rollouts.referred(config) else None
        self._divergence = rollouts.divergence(config)
        self._first = True

    def __call__(self, state: TrainState, rows: Batch, samples: Sequence[Sample], *, by: Params | None = None) -> Hindsight:
        """Return the rows of some samples with what is said of them.

        Args:
          state: of the policy that learns from them.
          rows: all of them.
          samples: what they were made of.
          by: what was trained of the weights that sampled them, where that is not what is trained now: it is they that are compared.

        Raises:
          ValueError: at the first call, sampler and trainer disagree.
        """
        # Of a sample that was cut too, from which perhaps nothing is learnt.
        drawn = dataclasses.replace(rows, loss_mask=online.laid(rows, [sample.drawn for sample in samples]))
        said, metrics = None, {}
        if self._first and (self._filtered or by is not None):
            temperature = 1.0 if self._filtered else self._run.config.rollout.temperature
            # A filter draws from less than the policy, so then the models are compared.
            sampled = online.laid(rows, [sample.logps for sample in samples]) if self._filtered else rows.behavior_logps
            self._check(sampled, drawn, state.trainable if by is None else by, temperature)
        compared = not self._filtered and by is None
        if self._several or self._penalised or self._valued or (self._first and compared):
            said = self._policy(state.trainable, drawn, self._run.config.rollout.temperature)
            if compared and self._first:
                self._check(rows.behavior_logps, drawn, state.trainable, self._run.config.rollout.temperature, said.logps)
            if compared:
                gap = online.disagreement(rows.behavior_logps, said.logps, drawn.loss_mask)
                metrics["sampler_gap"] = Mean(np.float32(gap.mean), np.float32(1))
        self._first, kl = False, np.zeros_like(rows.loss_mask)
        if self._reference:
            reference = self._look(partial(self._reference, self._actor.frozen), rows).logps
            rows = dataclasses.replace(rows, reference_logps=reference)
            kl = np.asarray(self._divergence(jnp.where(rows.loss_mask > 0, said.logps - reference, 0))) if self._penalised else kl
        rows = dataclasses.replace(rows, old_logps=said.logps) if self._several else rows
        return Hindsight(dataclasses.replace(rows, old_values=said.values) if self._valued else rows, kl, metrics)

    def _policy(self, trainable: Params, rows: Batch, temperature: float) -> Scores:
        return self._look(partial(self._policies[temperature], trainable, self._actor.frozen), rows)

    def _check(self, sampled: np.ndarray, drawn: Batch, trainable: Params, temperature: float, logps: np.ndarray | None = None) -> None:
        """Refuse to go on where sampler and trainer differ; `logps` is what the trainer says of the samples, if it was asked."""
        dtype, mask = self._run.config.model.dtype, drawn.loss_mask
        logps = self._policy(trainable, drawn, temperature).logps if logps is None else logps
        again = self._policy(trainable, online.moved(drawn), temperature).logps if dtype == "bfloat16" else None
        gap = online.check_agreement(sampled, logps, mask, dtype=dtype, again=again)
        self._run.terminal.say(
            f"sampler and trainer agree about {int(mask.sum()):,} sampled tokens: {gap.mean:.1e} nats apart on average, "
            f"{gap.most:.1e} at most"
        )

    def _look(self, score: Callable[[Batch], Scores], rows: Batch) -> Scores:
        """Return what a scorer says of all rows, asked for as many at a time as a step learns from at a time."""
        config = self._run.config
        size = config.data.batch_size // config.data.accumulation
        parts = [jax.tree.map(lambda x, at=at: x[at : at + size], rows) for at in range(0, rows.tokens.shape[0], size)]
        mesh = self._run.mesh
        found = [sharding.whole(score(build.on_mesh(sharding.own_rows(part, mesh), mesh))) for part in parts]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
