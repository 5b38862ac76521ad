"""The training loop of a sweep: one batch, one step of all members, and at each evaluation a verdict on every one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ftjax import logs
from ftjax.checkpoint import Checkpoints, Record
from ftjax.cli.late import Late, first_step
from ftjax.cli.loop import EARLY, FINISHED, NonFinite, due
from ftjax.cli.members import Member
from ftjax.cli.standing import LOST, Standing, table
from ftjax.cli.stop import Stop
from ftjax.sweep import Frozen, Step, SweepState
from ftjax.types import Batch, Mean, Metrics, TrainState


@dataclasses.dataclass
class Memory:
    """What a sweep remembers beside its state."""

    standings: list[Standing]
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What was measured before the first step."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Memory:
        """Return what `dataclasses.asdict` made plain data of."""
        return cls([Standing(**standing) for standing in stored["standings"]], stored["before"])


@dataclasses.dataclass(frozen=True)
class Loop:
    """What stays the same from step to step."""

    config: Any
    config_json: Mapping[str, Any]
    members: Sequence[Member]
    step: Step
    frozen: Frozen
    batches: Callable[[int], Iterator[Batch]]
    """`batches(start) -> iterator` of numpy batches: this process's rows."""
    put: Callable[[Batch], Batch]
    """Onto the mesh."""
    flops: Callable[[Batch], float]
    """Of one member."""
    parts: int
    """Of how many parts like this process's rows a batch consists; the others are taken to hold as many tokens."""
    learning_rates: Sequence[Callable[[int], Any]]
    evaluate: Callable[[SweepState], list[dict[str, float]]]
    evaluate_every: int
    remember: Callable[[SweepState, np.ndarray, np.ndarray], SweepState]
    """`(state, better [n], active [n]) -> state`."""
    checkpoints: Checkpoints
    writers: logs.Writers
    terminal: logs.Terminal
    meter: logs.Meter
    stop: Stop
    memory: Memory


def take_steps(loop: Loop, state: SweepState, *, start: int) -> tuple[SweepState, int, str]:
    """Train from step `start` on.

    Returns:
      The state, the number of steps done, and why the loop ended: `FINISHED`, `EARLY` (no member trains any more), or the name of a signal.

    Raises:
      NonFinite: not one member took a finite step of late; all of them have been saved.
    """
    config, readings, done = loop.config, Readings(loop), start
    loop.terminal.start(config.steps, done=start)
    batches = loop.batches(start)
    try:
        loop.meter.restart()
        reason = _reason(loop, done)
        if reason:
            _save(loop, state, done)
        while done < config.steps and not reason:
            batch = next(batches)
            placed = loop.put(batch)
            with jax.transfer_guard("disallow"):  # nothing slips from the host into a step
                state, metrics = loop.step(state, loop.frozen, placed)
            done += 1
            readings.add(done, metrics, batch)
            reason = _reason(loop, done)
            evaluating = due(done, loop.evaluate_every, config.steps)
            if reason or evaluating or due(done, config.checkpoint.every_steps, config.steps):
                readings.flush()
                state = _evaluate(loop, state, done) if evaluating else state  # before a stop too: who goes on from here does not do it
                reason = reason or _over(loop)
                if reason or due(done, config.checkpoint.every_steps, config.steps):
                    _save(loop, state, done)
                loop.meter.restart()
    finally:
        batches.close()
        loop.terminal.stop()
    loop.checkpoints.wait()
    if all(standing.ended == LOST for standing in loop.memory.standings):
        raise NonFinite(
            f"the last {config.max_skipped_steps} steps of every member had a loss or gradient that is not finite, and changed no weight. "
            "Try lower learning rates or more warmup_steps, look at the data with `ftjax inspect`, or set model.dtype to float32."
        )
    return state, done, reason or FINISHED


def _reason(loop: Loop, done: int) -> str | None:
    """Return why to end after `done` steps, if there is a reason."""
    return (loop.stop.reason or "SIGTERM") if loop.stop.at(done) else _over(loop)


def _over(loop: Loop) -> str | None:
    return EARLY if all(standing.ended for standing in loop.memory.standings) else None


def _evaluate(loop: Loop, state: SweepState, done: int) -> SweepState:
    """Judge the members that still train, and return the state that knows the best of each and who goes on."""
    config, standings, values = loop.config, loop.memory.standings, {}
    better = np.zeros(len(standings), bool)
    for index, (standing, found) in enumerate(zip(standings, loop.evaluate(state), strict=True)):
        if not standing.ended:
            values |= {f"eval/{name}/{index}": value for name, value in found.items()}
            better[index] = standing.judge(
                found[config.checkpoint.best_metric],
                step=done,
                metric=config.checkpoint.best_metric,
                patience=config.early_stopping.patience,
                most_skipped=config.max_skipped_steps,
            )
    loop.writers.write(done, values)
    loop.terminal.say(f"evaluation at step {done}")
    loop.terminal.say(table(loop.members, standings, config.checkpoint.best_metric))
    return loop.remember(state, better, np.array([not standing.ended for standing in standings]))


def _save(loop: Loop, state: SweepState, done: int) -> None:
    loop.checkpoints.save(as_train_state(state), Record(done, loop.config_json, {}, dataclasses.asdict(loop.memory)))


def as_train_state(state: SweepState) -> TrainState:
    """Return the state in the form that checkpoints hold."""
    members = state.members
    trainable = {"last": members.trainable, "best": state.best}
    return TrainState(members.step, members.key, trainable, {"optimizer": members.opt_state, "active": state.active})


def from_train_state(stored: TrainState) -> SweepState:
    """Return the state that `as_train_state` made a checkpoint's of."""
    members = TrainState(stored.step, stored.key, stored.trainable["last"], stored.opt_state["optimizer"])
    return SweepState(members, stored.opt_state["active"], stored.trainable["best"])


class Readings:
    """Sums up the metrics of each member that trains, and reports."""

    def __init__(self, loop: Loop):
        self._loop, self._late, self._first = loop, Late(self._read), True

    def add(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Take the metrics of a step, still on the devices."""
        self._late.add(step, metrics, batch)
        self._loop.terminal.advance(step)

    def flush(self) -> None:
        """Read what is waiting, which waits for the devices."""
        self._late.flush()

    def _read(self, step: int, means: Metrics, batch: Batch) -> None:
        loop = self._loop
        if self._first:
            self._first = False
            first_step(loop.writers, loop.terminal, step)
        training = [index for index, standing in enumerate(loop.memory.standings) if not standing.ended]
        for index in training:
            loop.memory.standings[index].step({name: Mean(mean.total[index], mean.weight[index]) for name, mean in means.items()})
        times = loop.parts * len(training)
        loop.meter.add(times * int((np.asarray(batch.segment_ids) > 0).sum()), times * loop.flops(batch))
        if step % loop.config.logging.every_steps == 0 or step == loop.config.steps:
            self._report(step, training)

    def _report(self, step: int, training: Sequence[int]) -> None:
        loop, values = self._loop, {}
        for index in training:
            found = loop.memory.standings[index].report() | {"learning_rate": float(loop.learning_rates[index](step - 1))}
            values |= {f"train/{name}/{index}": value for name, value in found.items()}
        common = loop.meter.read()
        values |= {f"train/{name}": value for name, value in common.items()}
        loop.writers.write(step, values)
        losses = " ".join(f"{standing.train_loss:.3f}" for standing in loop.memory.standings)
        loop.terminal.progress(step, f"loss {losses}  {common['tokens_per_second']:,.0f} tokens/s  {common['memory_gb']:.2f} GB")
