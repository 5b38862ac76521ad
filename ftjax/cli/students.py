"""On-policy distillation: some batches the student writes itself, and its teacher says at every token what it would have said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import data, logs, online, rollout, scoring, sharding
from ftjax.cli import build
from ftjax.cli.config import plain
from ftjax.cli.hindsight import Actor
from ftjax.cli.run import Lessons, Run
from ftjax.rollout import Sample
from ftjax.types import Batch, Mean, Metrics, Model, TrainState


def own(config) -> np.ndarray:
    """Return bool `[steps]`: the steps that learn from what the student writes; the first so many are the same however many there are."""
    draws = np.random.default_rng([config.seed % 2**63, 3]).random(config.steps)
    return draws < config.student.on_policy


class Students:
    """The batches of a student that answers some prompts itself: a `Loop.batch`.

    GKD: Agarwal et al., 2023, arXiv 2306.13649, algorithm 1, with λ = `student.on_policy`, drawn anew for each step. The other steps learn
    from the data, in its order, of which none is left out. Which step is which, the prompts and the keys are functions of the seed and the
    step, so that a resumed run goes on with the same bits.
    """

    def __init__(self, run: Run, actor: Actor, lessons: Lessons, *, start: int, meter: logs.Meter):
        config = run.config
        if lessons.loader.heard is not None:
            raise ValueError(
                "student.on_policy: the teacher has tokens of its own, and what the student writes is in the student's: set it to 0."
            )
        self._run, self._actor, self._meter, self._own = run, actor, meter, own(config)
        self._prompts, _ = prompts(config, lessons.encoder)
        self._sample = sampler(config, actor.model, run.mesh, lessons.encoder)
        self._given: Iterator[Batch] = lessons.loader.iterate(int(np.sum(~self._own[:start])))
        self._first = True

    def __call__(self, state: TrainState, done: int) -> tuple[Batch, Metrics]:
        """Return the batch after `done` steps, and what there is to say of how it came about."""
        if not self._own[done]:
            return next(self._given), {"on_policy": _mean(0, 1)}
        jax.block_until_ready(state)
        with self._meter.paused():
            return self._written(state, done)

    def stored(self, state: TrainState) -> TrainState:
        """Return what a checkpoint holds: the state."""
        return state

    def close(self) -> None:
        """End the thread that makes batches of the data."""
        self._given.close()

    def _written(self, state: TrainState, done: int) -> tuple[Batch, Metrics]:
        config = self._run.config
        asked = self._prompts.at(int(np.sum(self._own[:done])))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 4), done)
        began = time.perf_counter()
        params = self._actor.method.attach(self._actor.frozen, state.trainable)
        samples = self._sample(params, asked, jax.random.split(key, (len(asked), 1)))
        seconds = time.perf_counter() - began
        rows = online.rows([prompt.tokens for prompt in asked], samples, max_tokens=config.data.max_tokens)
        rows = Batch(rows.tokens, rows.loss_mask, rows.positions, rows.segment_ids)
        if self._first:
            self._first = False
            self._check(state, rows, samples)
        lengths = [len(sample.tokens) for sample in samples]
        return rows, {
            "on_policy": _mean(1, 1),
            "length": _mean(sum(lengths), len(lengths)),
            "finished": _mean(sum(sample.finished for sample in samples), len(samples)),
            "sampling_seconds": _mean(seconds, 1),
            "sampled_tokens_per_second": _mean(sum(lengths), seconds),
        }

    def _check(self, state: TrainState, rows: Batch, samples: list[Sample]) -> None:
        """Refuse to go on where sampler and trainer are not one model: the rows of a micro-batch tell."""
        config, mesh = self._run.config, self._run.mesh
        look = partial(scoring.score, sharding.on_mesh(self._actor.model, mesh), batch_shards=sharding.row_parts(mesh), outputs=("logps",))
        score = jax.jit(lambda trainable, frozen, batch: look(self._actor.method.attach(frozen, trainable), batch).logps)
        part = jax.tree.map(lambda x: x[: config.data.batch_size // config.data.accumulation], rows)
        say = lambda part: jax.device_get(score(state.trainable, self._actor.frozen, build.on_mesh(part, mesh)))  # noqa: E731
        again = say(online.moved(part)) if config.model.dtype == "bfloat16" else None
        sampled = online.laid(part, [sample.logps for sample in samples[: len(part.tokens)]])
        gap = online.check_agreement(sampled, say(part), part.loss_mask, dtype=config.model.dtype, again=again)
        self._run.terminal.say(f"student and trainer agree about {int(part.loss_mask.sum()):,} sampled tokens: {gap.most:.1e} nats at most")


def prompts(config, encoder: data.Encoder) -> tuple[data.Prompts, dict[str, data.Report]]:
    """Return the prompts of the data that the student may answer, as many at a time as a batch has rows."""
    options = {"seed": config.seed, "shuffle": config.data.shuffle, "bad_rows": config.data.bad_rows}
    specs = {name: plain(source) for name, source in config.data.sources.items()}
    return data.load_prompts(specs, encoder, count=config.data.batch_size, max_tokens=config.student.max_tokens, **options)


def sampler(config, model: Model, mesh: Mesh, encoder: data.Encoder) -> online.Sampler:
    """Return how the student answers."""
    asked, template = config.student, encoder.template.source if encoder.template else "none"
    eos_ids = rollout.Encoder(model, encoder.tokenizer, template=template).eos_ids
    options = {"slots": config.data.batch_size, "slot_tokens": config.data.max_tokens}
    engine = rollout.Engine(sharding.on_mesh(model, mesh), eos_ids, **options)
    chosen = rollout.settings(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
    return online.sampler(engine, max_tokens=asked.max_tokens, sampling=chosen)


def _mean(total: float, weight: float) -> Mean:
    return Mean(np.float32(total), np.float32(weight))
