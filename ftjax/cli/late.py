"""The numbers of a step, read one step late so that the devices never wait for the host, and summed until they are reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from ftjax import logs
from ftjax.types import Batch, Mean, Metrics

Sums = dict[str, list[float]]
"""`{metric: [total, weight]}` over the steps since the last report."""


class Late:
    """Reads the metrics of a step after the next one has been handed to the devices.

    On a CPU, where the host itself computes, there is nothing to gain by that, and they are read at once.

    Args:
      read: `(step, metrics on the host, batch)`.
      late: whether to read late; everywhere but on a CPU if None.
    """

    def __init__(self, read: Callable[[int, Any, Batch], None], *, late: bool | None = None):
        self._read = read
        self._late = jax.default_backend() != "cpu" if late is None else late
        self._waiting: tuple[int, Metrics, Batch] | None = None

    def add(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Take the metrics of a step, still on the devices; read those of the step before."""
        before, self._waiting = self._waiting, (step, metrics, batch)
        if before:
            self._hand_on(*before)
        if not self._late:
            self.flush()

    def flush(self) -> None:
        """Read what is waiting, which waits for the devices."""
        if self._waiting:
            waiting, self._waiting = self._waiting, None
            self._hand_on(*waiting)

    def _hand_on(self, step: int, metrics: Metrics, batch: Batch) -> None:
        self._read(step, jax.device_get(metrics), batch)


def add_to(sums: Sums, means: Mapping[str, Mean]) -> None:
    """Add the metrics of a step, on the host."""
    for name, mean in means.items():
        total, weight = sums.get(name, (0.0, 0.0))
        sums[name] = [total + float(mean.total), weight + float(mean.weight)]


def values_of(sums: Sums) -> dict[str, float]:
    """Return what is reported of the sums: means, but of tokens and skipped steps how many."""
    values = {name: Mean(*sum).value() for name, sum in sums.items() if name not in ("tokens", "skipped")}
    return values | {"supervised_tokens": sums["tokens"][0], "skipped": sums["skipped"][0]}


def first_step(writers: logs.Writers, terminal: logs.Terminal, step: int) -> None:
    """Say how long it took until the first step of this process was done."""
    writers.write(step, {"run/seconds_to_first_step": logs.process_seconds()})
    terminal.say(f"the first step was done {logs.process_seconds():.1f} s after the process began")
