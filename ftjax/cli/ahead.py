"""Experiences ahead of the training: each sampled by the weights as they were some experiences before, in a thread beside the steps.

With W(i) for what is trained before experience i is learnt from, and a bound k, experience i is sampled by W(max(0, i - k)): k = 0 is
on-policy, and nothing runs beside anything. Which weights sample which experience follows from its number alone, never from how fast a
machine is. So a checkpoint needs no experience that is on its way, only the weights that sample it: it is sampled anew, with the same bits.
One step off: Noukhovitch et al., 2024, arXiv 2410.18252; several: Fu et al., 2025, arXiv 2505.24298. Old log-probabilities and values are
those of W(i), so that a step is held near where it begins, and `losses.correction` weighs what W(i - k) drew: the decoupled objective of
Hilton et al., 2021, arXiv 2110.00641.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.types import Params, TrainState

SAMPLED_BY = "sampled_by"
"""The name in `TrainState.carried` of a checkpoint under which the past stands."""

Past = tuple[Params, ...]
"""Before experience i is learnt from: W(i - k), …, W(i - 1), the oldest first; W(0) stands for what was before it."""

_copy = jax.jit(partial(jax.tree.map, jnp.copy))


class Ended(Exception):
    """Nobody waits for the experience any more."""


class Devices:
    """Held by whoever samples, one thread at a time; once closed, by nobody."""

    def __init__(self):
        self._lock, self._closed = threading.RLock(), False
        self.resting = threading.Event()
        """Set while nobody samples, nor is about to."""
        self.resting.set()

    def __enter__(self) -> Devices:
        self._lock.acquire()
        if self._closed:
            self._lock.release()
            raise Ended
        self.resting.clear()
        return self

    def __exit__(self, *error) -> None:
        self.resting.set()
        self._lock.release()

    def going(self) -> None:
        """Raise `Ended` once they are closed: for who holds them, to ask now and then."""
        if self._closed:
            raise Ended

    def take(self) -> None:
        """Keep all other threads from sampling, from the end of what they sample on."""
        self._lock.acquire()

    def leave(self) -> None:
        """Let them sample again."""
        self._lock.release()

    def close(self) -> None:
        """Wait for who holds them; whoever comes later gets `Ended`."""
        self._closed = True
        with self._lock:
            pass


def with_past(state: TrainState, past: Past | None = None, *, bound: int) -> TrainState:
    """Return what a checkpoint holds of a run: its state, and beside it the weights that sample what is on its way.

    Args:
      state: concrete, or shapes if the past is given.
      past: copies of what is trained if None, as before the first step.
      bound: k; the state as it is where it is 0.
    """
    if not bound:
        return state
    past = (_copy(state.trainable),) * bound if past is None else past
    return dataclasses.replace(state, carried={**state.carried, SAMPLED_BY: past})


def without_past(state: TrainState) -> tuple[TrainState, Past]:
    """Return the two parts of what `with_past` made."""
    carried = dict(state.carried)
    past = tuple(carried.pop(SAMPLED_BY, ()))
    return dataclasses.replace(state, carried=carried), past


class Ahead:
    """Samples experiences in their order, as many ahead of the training as the past is long.

    Args:
      sample: `(trainable, index) -> experience`; it samples while it holds `devices`.
      past: of the first experience that will be asked for, from `without_past`; empty: nothing is sampled ahead.
      count: the experiences of the whole run; none beyond is sampled.
      devices: closed with this.
      beside: whether it samples beside the steps too, and not only judges. Not on a mesh of several devices: programs that two threads send
        there may come to them in different orders, and then they wait for each other for ever. There it samples while it is waited for.
    """

    def __init__(self, sample: Callable[[Params, int], Any], past: Past, *, count: int, devices: Devices, beside: bool = True):
        self.past = past
        """Those of the next experience that will be asked for."""
        self._sample, self._count = sample, count
        self._asked: queue.SimpleQueue[tuple[Future, Params, int] | None] = queue.SimpleQueue()
        self._waiting: deque[Future] = deque()
        self._thread: threading.Thread | None = None
        self._devices, self._beside, self._taken = devices, beside, False
        self._counting, self._unfinished = threading.Lock(), 0

    def __call__(self, trainable: Params, index: int) -> Any:
        """Return an experience, and have the one sampled that these weights are for.

        Args:
          trainable: W(index); a copy is taken, so that a step may overwrite it.
          index: of the experience: one more each time.

        Raises:
          Exception: what `sample` raised for it.
        """
        if not self.past:
            return self._sample(trainable, index)
        if self._thread is None:
            # A daemon: a judge that hangs does not keep the program from ending.
            self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)
            self._thread.start()
            for lead, by in enumerate(self.past):
                self._ask(by, index + lead)
        self.past = (*self.past[1:], _copy(trainable))
        self._ask(self.past[-1], index + len(self.past))
        return self._waited_for(self._waiting.popleft())

    def close(self) -> None:
        """End the thread. It is waited for while it holds the devices, which an interpreter that ends must not take away from it."""
        self._asked.put(None)
        self._devices.close()
        self._leave()

    def _waited_for(self, future: Future) -> Any:
        self._leave()
        found = future.result()
        if not self._beside:
            self._devices.resting.wait()  # the next experience is sampled too, and is judged beside the steps
            self._devices.take()
            self._taken = True
        return found

    def _leave(self) -> None:
        if self._taken:
            self._taken = False
            self._devices.leave()

    def _ask(self, by: Params, index: int) -> None:
        if index < self._count:
            future: Future = Future()
            self._waiting.append(future)
            with self._counting:
                if not self._unfinished:  # else the thread samples, or judges and will say so when it is about to sample
                    self._devices.resting.clear()
                self._unfinished += 1
            self._asked.put((future, by, index))

    def _work(self) -> None:
        for future, by, index in iter(self._asked.get, None):
            try:
                found, error = self._sample(by, index), None
            except BaseException as raised:  # raised again where the experience is asked for
                found, error = None, raised
            with self._counting:
                self._unfinished -= 1
                if self._unfinished:
                    self._devices.resting.clear()
                else:
                    self._devices.resting.set()
            future.set_exception(error) if error else future.set_result(found)
