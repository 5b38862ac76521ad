"""SIGTERM and Ctrl-C: finish the step, save, and go; a second one does not wait."""

from __future__ import annotations

import os
import signal
from types import FrameType

import jax


class Stop:
    """Remembers that the run was asked to end. A context manager: signals are as before when it is left.

    After the first SIGTERM or Ctrl-C the loop saves and the process exits with 0: nothing is lost, and the same command goes on. A second
    one raises `KeyboardInterrupt` at once; the last complete checkpoint stays.
    """

    def __init__(self):
        self.reason: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        # With several processes SIGTERM belongs to JAX's coordination service, which tells all of them.
        for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Return whether to end after `step`; all processes of a run get the same answer."""
        if jax.process_count() == 1:
            return self.reason is not None
        # It names a step that every process has yet to reach.
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.reason = self.reason or "SIGTERM"
            return True
        return False
