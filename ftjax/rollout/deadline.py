"""Calls that may raise or hang, side by side, each in its own time."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

AT_ONCE = 4 * (os.cpu_count() or 1)
"""Calls that run at a time: tools wait more than they compute, but a program in a jail takes a core."""


def within(seconds: float, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return what each call returns, or the exception that it raised, in order; of one that hangs, a `TimeoutError`.

    Each runs in a thread of its own, a coroutine in an event loop there. Python ends no thread: what hangs stays behind until it returns,
    and does not keep the program from ending. What computes in C without letting go of the interpreter (`9**9**9`) cannot be left behind,
    and stops everything; such a thing belongs into a process of its own (`rewards.sandbox`).

    >>> within(0.2, [lambda: 1, lambda: 1 / 0])
    [1, ZeroDivisionError('division by zero')]
    """
    found: list[Any] = []
    for at in range(0, len(calls), AT_ONCE):
        begun = [(_begin(call, seconds), time.monotonic() + seconds) for call in calls[at : at + AT_ONCE]]
        found += [_end(future, deadline, seconds) for future, deadline in begun]
    return found


def _begin(call: Callable[[], Any], seconds: float) -> Future:
    future: Future = Future()

    def run() -> None:
        try:
            found = call()
            future.set_result(asyncio.run(_finish(found, seconds)) if inspect.isawaitable(found) else found)
        except BaseException as error:  # a call of sys.exit has failed, and no more than that
            future.set_exception(error)

    threading.Thread(target=run, name="environment", daemon=True).start()
    return future


async def _finish(found: Any, seconds: float) -> Any:
    return await asyncio.wait_for(found, seconds + 1.0)  # the caller's deadline comes first


def _end(future: Future, deadline: float, seconds: float) -> Any:
    try:
        error = future.exception(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return TimeoutError(f"did not return within {seconds:g} s")
    return future.result() if error is None else error
