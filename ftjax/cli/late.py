"""The numbers of a step, read one step late so that the devices never wait for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ftjax import logs
from ftjax.types import Batch, Metrics


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


def first_step(writers: logs.Writers, terminal: logs.Terminal, step: int) -> None:
    """Say how long it took until the first step of this process was done."""
    writers.write(step, {"run/seconds_to_first_step": logs.process_seconds()})
    terminal.say(f"the first step was done {logs.process_seconds():.1f} s after the process began")
