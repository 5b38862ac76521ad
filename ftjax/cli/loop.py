"""The training loop: batches in, steps done, numbers out one step late so that the devices never wait for the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ftjax import logs
from ftjax.checkpoint import Checkpoints, Record, improves
from ftjax.cli.advice import ENOUGH, advice, responses
from ftjax.cli.late import Late, Sums, add_to, first_step, values_of
from ftjax.cli.stop import Stop
from ftjax.train import Step
from ftjax.types import Batch, Mean, Metrics, Params, TrainState

FINISHED, EARLY = "finished", "early stopping"
"""Why a loop ended, where no signal ended it."""

Evaluate = Callable[[TrainState, int], dict[str, float]]
"""`(state, step) -> values`: held-out metrics; logs what is not a number itself."""


class NonFinite(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass
class Memory:
    """What a run remembers beside its state, so that a resumed one decides and reports as an uninterrupted one would."""

    best: float | None = None
    bad_evals: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """`{metric: [total, weight]}` over the steps since the last report."""
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What was measured before the first step."""
    window: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Like `sums`, since the last reading that advice was asked of: see `ftjax.cli.advice`."""
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    """The first reading."""
    kl_coefs: dict[str, float] = dataclasses.field(default_factory=dict)
    """`{experience: coefficient}` of an adaptive KL penalty: see `ftjax.cli.leash`."""
    advised: list[str] = dataclasses.field(default_factory=list)
    """The patterns that were pointed out already: each once."""


class Stream:
    """Batches in an order of their own, whatever the state: a `Loop.batch`."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches

    def __call__(self, state: TrainState, done: int) -> tuple[Batch, Metrics]:
        """Return the next batch."""
        del state, done
        return next(self._batches), {}

    def stored(self, state: TrainState) -> TrainState:
        """Return what a checkpoint holds: the state."""
        return state

    def close(self) -> None:
        """End the thread that makes them."""
        self._batches.close()


@dataclasses.dataclass(frozen=True)
class Loop:
    """What stays the same from step to step."""

    config: Any
    config_json: Mapping[str, Any]
    step: Step
    frozen: Params
    batch: Callable[[TrainState, int], tuple[Batch, Metrics]]
    """`(state, steps done) -> (batch, metrics)`: this process's rows as numpy arrays, and what is to be said of how they came about. They
    may be made by the state: an experience that the policy sampled."""
    stored: Callable[[TrainState], TrainState]
    """What a checkpoint holds of a state: with what the batches to come need of the steps before, such as the weights that sample them."""
    stride: int
    """The steps taken on one experience: between them nothing is evaluated, saved or stopped. 1 where no batch depends on a state."""
    put: Callable[[Batch], Batch]
    """Onto the mesh."""
    flops: Callable[[Batch], float]
    parts: int
    """Of how many parts like this process's rows a batch consists; the others are taken to hold as many tokens."""
    learning_rate: Callable[[int], Any]
    evaluate: Evaluate | None
    evaluate_every: int
    """Steps between two evaluations."""
    checkpoints: Checkpoints
    writers: logs.Writers
    terminal: logs.Terminal
    meter: logs.Meter
    stop: Stop
    memory: Memory


def take_steps(loop: Loop, state: TrainState, *, start: int) -> tuple[TrainState, int, str]:
    """Train from step `start` on.

    Returns:
      The state, the number of steps done, and why the loop ended: `FINISHED`, `EARLY`, or the name of a signal.

    Raises:
      NonFinite: `max_skipped_steps` in a row changed nothing; the last finite state has been saved.
    """
    config, readings, done = loop.config, Readings(loop), start
    loop.terminal.start(config.steps, done=start)
    try:
        loop.meter.restart()
        reason = _reason(loop, done)  # asked to stop while all was set up, or ended early by the process before
        if reason:
            _save(loop, state, done, {}, ending=True)
        while done < config.steps and not reason:
            batch, origin = loop.batch(state, done)
            placed = loop.put(batch)
            with jax.transfer_guard("disallow"):  # nothing slips from the host into a step
                state, metrics = loop.step(state, loop.frozen, placed)
            done += 1
            readings.add(done, {**metrics, **origin}, batch)
            if done % loop.stride:
                continue
            reason = _reason(loop, done)
            evaluating = loop.evaluate is not None and due(done, loop.evaluate_every, config.steps)
            if reason or evaluating or due(done, config.checkpoint.every_steps, config.steps):
                readings.flush()
                values = _evaluate(loop, state, done) if evaluating else {}  # before a stop too: who goes on from here does not do it
                reason = reason or _early(loop)
                _save(loop, state, done, values, ending=bool(reason))
                loop.meter.restart()
    except NonFinite:
        loop.memory.skipped_in_a_row = 0  # who goes on from here has changed something
        _save(loop, state, done, {}, ending=True)
        loop.checkpoints.wait()
        raise
    finally:
        loop.terminal.stop()
    loop.checkpoints.wait()
    return state, done, reason or FINISHED


def _reason(loop: Loop, done: int) -> str | None:
    """Return why to end after `done` steps, if there is a reason."""
    return (loop.stop.reason or "SIGTERM") if loop.stop.at(done // loop.stride) else _early(loop)


def _early(loop: Loop) -> str | None:
    return EARLY if 0 < loop.config.early_stopping.patience <= loop.memory.bad_evals else None


def due(done: int, every: int, last: int) -> bool:
    """Return whether what comes every so many steps (0: never), and at the last, comes now."""
    return done == last or (every > 0 and done % every == 0)


def _evaluate(loop: Loop, state: TrainState, done: int) -> dict[str, float]:
    values = loop.evaluate(state, done)
    loop.writers.write(done, {f"eval/{name}": value for name, value in values.items()})
    metric = loop.config.checkpoint.best_metric
    if metric not in values:
        raise ValueError(f"checkpoint.best_metric: the evaluation has no {metric!r}; it has {', '.join(values)}.")
    better = improves(values[metric], loop.memory.best, metric)
    loop.memory.best = values[metric] if better else loop.memory.best
    loop.memory.bad_evals = 0 if better else loop.memory.bad_evals + 1
    loop.terminal.say(
        f"[bold]evaluation[/] at step {done}: "
        + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        + ("  (best)" if better else ""),
        markup=True,
    )
    return values


def _save(loop: Loop, state: TrainState, done: int, values: Mapping[str, float], *, ending: bool) -> None:
    """Save where a checkpoint is due, where the run ends, and where it has never been better."""
    best = bool(values) and loop.memory.bad_evals == 0
    if best or ending or due(done, loop.config.checkpoint.every_steps, loop.config.steps):
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        loop.checkpoints.save(loop.stored(state), Record(done, loop.config_json, finite, dataclasses.asdict(loop.memory)))


class Readings:
    """Sums up the metrics of the steps, counts those that are skipped, and reports."""

    def __init__(self, loop: Loop, *, late: bool | None = None):
        self._loop, self._late, self._first = loop, Late(self._read, late=late), True

    def add(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Take the metrics of a step, still on the devices."""
        self._late.add(step, metrics, batch)
        self._loop.terminal.advance(step)

    def flush(self) -> None:
        """Read what is waiting, which waits for the devices."""
        self._late.flush()

    def _read(self, step: int, means: Metrics, batch: Batch) -> None:
        if self._first:
            self._first = False
            first_step(self._loop.writers, self._loop.terminal, step)
        self._loop.meter.add(self._loop.parts * int((np.asarray(batch.segment_ids) > 0).sum()), self._loop.parts * self._loop.flops(batch))
        self._check(step, means)
        add_to(self._loop.memory.sums, means)
        if step % self._loop.config.logging.every_steps == 0 or step == self._loop.config.steps:
            self._report(step)

    def _check(self, step: int, means: Metrics) -> None:
        """Count and name steps that changed nothing; raise after too many in a row."""
        memory, most = self._loop.memory, self._loop.config.max_skipped_steps
        if not means["skipped"].total:
            memory.skipped_in_a_row = 0
            return
        if not means["tokens"].total:  # as where no sample of an experience was good enough
            self._loop.terminal.say(f"[yellow]step {step} taught nothing[/]: no token of its batch counts", markup=True)
            return
        memory.skipped += 1
        memory.skipped_in_a_row += 1
        self._loop.terminal.say(
            f"[yellow]step {step} was skipped[/]: loss {means['loss'].value():.4g}, gradient norm {means['grad_norm'].value():.4g} "
            f"({memory.skipped} so far)",
            markup=True,
        )
        if memory.skipped_in_a_row >= most > 0:
            raise NonFinite(
                f"{most} steps in a row, the last of them step {step}, had a loss or gradient that is not finite, and changed no weight. "
                "Try a lower optimizer.learning_rate or more warmup_steps, look at the data of these steps with `ftjax inspect`, or set "
                "model.dtype to float32. The last finite weights are saved; max_skipped_steps says how many to bear."
            )

    def _report(self, step: int) -> None:
        sums, self._loop.memory.sums = self._loop.memory.sums, {}
        values = values_of(sums) | self._loop.meter.read()
        values["learning_rate"] = float(self._loop.learning_rate(step - 1))
        self._loop.writers.write(step, {f"train/{name}": value for name, value in values.items()})
        self._loop.terminal.report(step, values)
        self._advise(step, sums)

    def _advise(self, step: int, sums: Sums) -> None:
        """Say what a pattern means where one appears: on the terminal, and as `advice/NAME` where the metrics go."""
        memory, config = self._loop.memory, self._loop.config
        add_to(memory.window, {name: Mean(*sum) for name, sum in sums.items()})
        count = responses(memory.window)
        if count is not None and count < ENOUGH:
            return
        window, memory.window = memory.window, {}
        values = values_of(window) | {"responses": count or 0, "progress": step / config.steps}
        if not memory.first:
            memory.first = values
            return
        for name, text in advice(memory.first, values, algorithm=config.algorithm).items():
            if name not in memory.advised:
                memory.advised.append(name)
                self._loop.terminal.say(f"[yellow]{name}[/]: {text}", markup=True)
                self._loop.writers.text(step, f"{logs.ADVICE}{name.replace(' ', '_')}", text)
