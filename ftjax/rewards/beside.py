"""Calls side by side, a bounded number of them at a time, that keep no program from ending."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def beside(calls: Sequence[Callable[[], T]], *, at_once: int, whose: str) -> list[T]:
    """Return what each call returns, in order; raise what the first that failed raised, after which no further one begins.

    The threads are daemons, where those of a `concurrent.futures` pool are waited for when the program ends, with all that waits in it.

    Args:
      calls: what to do.
      at_once: how many run at a time, of all that `whose` threads ask for: a reward that is asked once for each row is one asker too.
      whose: a name.

    >>> beside([lambda: 1, lambda: 2, lambda: 3], at_once=2, whose="example")
    [1, 2, 3]
    """
    gate, lock, over = _gate(whose, at_once), threading.Lock(), threading.Event()
    found: list[Future[T]] = [Future() for _ in calls]
    left = iter(zip(found, calls, strict=True))

    def work() -> None:
        while not over.is_set():
            with lock:
                future, call = next(left, (None, None))
            if future is None or call is None:
                return
            with gate:
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(at_once, len(calls))):
        threading.Thread(target=work, name=whose, daemon=True).start()
    try:
        return [future.result() for future in found]
    finally:
        over.set()


@functools.cache
def _gate(whose: str, at_once: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(at_once)
