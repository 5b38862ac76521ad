"""Several rewards at once: each in its own time, and one that fails is named with its prompt."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ftjax.rewards.completion import Completion, Reward
from ftjax.tree import nearest

ON_ERROR = ("raise", "skip")
AT_ONCE = 4 * (os.cpu_count() or 1)
"""Rows that are judged by themselves at a time."""


class RewardError(RuntimeError):
    """A reward raised, hung, or returned something that is no score."""


class Failure(NamedTuple):
    """One reward that could not judge one completion."""

    reward: str
    row: int
    prompt: Any
    reason: str

    def __str__(self) -> str:
        return f"reward {self.reward!r} {self.reason} (row {self.row}, prompt {_excerpt(self.prompt)})"


class Judged(NamedTuple):
    """What the rewards say of n completions."""

    scores: dict[str, np.ndarray]
    """Of each reward, float64 [n]; NaN where it does not apply or failed."""
    rewards: np.ndarray
    """Weighted sums of those that apply, float64 [n]; NaN where none does."""
    failures: tuple[Failure, ...]


def judge(
    rewards: Mapping[str, Reward],
    weights: Sequence[float],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout: float = 60.0,
    on_error: str = "raise",
) -> Judged:
    """Call all rewards side by side and add up what they say.

    rewards[i] = Σ_k weights[k] scores[k][i], over the k that apply to row i.

    Each call runs in a thread of its own, a coroutine in an event loop of its own, so that none can hold up another. A call over all rows
    that raises, hangs or returns no list of n is repeated row by row, `AT_ONCE` at a time: that finds the prompts, and the other rows keep
    what they get alone; none begins once the rows before have taken as long as a call may. Python ends no thread: what hangs stays behind
    until it returns, and does not keep the program from ending.

    Args:
      rewards: by name, in the order of `weights`; see `build`.
      weights: one a reward; empty: 1 each.
      prompts: n of them.
      completions: n of them, strings or lists of messages.
      columns: whatever else the rows have (`answer`, `completion_ids`, …), n values each.
      timeout: seconds a call may take.
      on_error: "raise", or "skip": a failure counts as "does not apply" and is listed.

    >>> from ftjax import rewards
    >>> panel = rewards.build(["exact_match", "repetition"], {"repetition": {"ngram_tokens": 1}})
    >>> columns = {"answer": ["2", None], "completion_ids": [[5], [5, 5, 6, 6]]}
    >>> rewards.judge(panel, (1.0, 0.5), ["1+1?", "2?"], ["2", "2 2 6 6"], columns).rewards
    array([ 1.  , -0.25])

    Raises:
      ValueError: a column that a reward needs is missing, or lengths differ.
      RewardError: a reward failed and `on_error` is "raise".
    """
    weights = tuple(weights) or (1.0,) * len(rewards)
    _check(rewards, weights, prompts, completions, columns, on_error)
    calls = {name: _Call(reward, prompts, completions, columns, timeout) for name, reward in rewards.items()}
    scores, failures = {}, []
    for name, call in calls.items():
        scores[name], reasons = _scores(call)
        failures += [Failure(name, row, prompts[row], reason) for row, reason in reasons.items()]
    if failures and on_error == "raise":
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise RewardError("; ".join(map(str, failures[:3])) + more + '. on_error="skip" goes on without them.')
    table = np.stack([weight * scores[name] for name, weight in zip(rewards, weights, strict=True)])
    total = np.where(np.isnan(table).all(axis=0), np.nan, np.nansum(table, axis=0))
    return Judged(scores, total, tuple(failures))


class _Call:
    """A reward at work on some rows, in a thread of its own."""

    def __init__(
        self, reward: Reward, prompts: Sequence[Any], completions: Sequence[Completion], columns: Mapping[str, Any], timeout: float
    ):
        self.reward, self.prompts, self.completions, self.columns = reward, prompts, completions, columns
        self.timeout = timeout
        self.future: Future[list[Any]] = Future()
        self.deadline = time.monotonic() + timeout
        threading.Thread(target=self._run, name="reward", daemon=True).start()

    def row(self, n: int) -> _Call:
        """Ask about one row alone."""
        columns = {name: values[n : n + 1] for name, values in self.columns.items()}
        return _Call(self.reward, self.prompts[n : n + 1], self.completions[n : n + 1], columns, self.timeout)

    def result(self) -> list[Any]:
        """Return the scores as they came, or raise `RewardError` with what went wrong."""
        try:
            scores = self.future.result(max(0.0, self.deadline - time.monotonic()))
        except TimeoutError as error:
            if self.future.done():
                raise RewardError(f"raised {error!r}") from error
            raise RewardError(f"did not return within {self.timeout:g} s") from None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not self.future.done():
                raise
            raise RewardError(f"raised {type(error).__name__}: {error}") from error
        if len(scores) != len(self.prompts):
            raise RewardError(f"returned {len(scores)} scores for {len(self.prompts)} completions")
        return scores

    def _run(self) -> None:
        try:
            found = self.reward(prompts=self.prompts, completions=self.completions, **self.columns)
            if inspect.isawaitable(found):
                found = asyncio.run(self._finish(found))
            self.future.set_result(list(found))
        except BaseException as error:  # a reward that calls sys.exit has failed, and no more than that
            self.future.set_exception(error)

    async def _finish(self, found: Any) -> Any:
        return await asyncio.wait_for(found, max(0.0, self.deadline - time.monotonic()) + 1.0)  # the caller's deadline comes first


def _scores(call: _Call) -> tuple[np.ndarray, dict[int, str]]:
    """Return the scores [n] and what went wrong, by row."""
    try:
        found: list[Any] = call.result()
    except RewardError as error:
        if len(call.prompts) == 1:
            return np.full(1, np.nan), {0: str(error)}
        parts = _row_by_row(call)
        reasons = {n: reason for n, (_, failed) in enumerate(parts) for reason in failed.values()}
        if reasons:
            return np.concatenate([scores for scores, _ in parts]), reasons
        return np.full(len(parts), np.nan), {0: f"{error}, though it judges each row alone"}
    scores, reasons = np.full(len(found), np.nan), {}
    for row, value in enumerate(found):
        try:
            scores[row] = np.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError):  # the last of an integer beyond all floats
            reasons[row] = f"returned {_excerpt(value)}, which is no number"
            continue
        if value is not None and not math.isfinite(scores[row]):
            reasons[row] = f"returned {scores[row]}"
            scores[row] = np.nan
    return scores, reasons


def _row_by_row(call: _Call) -> list[tuple[np.ndarray, dict[int, str]]]:
    """Return `_scores` of each row by itself."""
    parts, rows, until = [], iter(range(len(call.prompts))), time.monotonic() + call.timeout
    while chosen := list(itertools.islice(rows, AT_ONCE)):
        if time.monotonic() > until:
            late = f"was not asked by itself: the rows before it took {call.timeout:g} s"
            parts += [(np.full(1, np.nan), {0: late}) for _ in chosen]
        else:
            parts += [_scores(one) for one in [call.row(n) for n in chosen]]
    return parts


def _check(
    rewards: Mapping[str, Reward], weights: Sequence[float], prompts: Any, completions: Any, columns: Mapping[str, Any], on_error: str
) -> None:
    if on_error not in ON_ERROR:
        raise ValueError(f"rewards: on_error is one of {ON_ERROR}, not {on_error!r}; nearest: {nearest(on_error, ON_ERROR)}.")
    if not rewards or len(weights) != len(rewards):
        raise ValueError(f"rewards: {len(rewards)} rewards with {len(weights)} weights; give one weight each, or none for 1 each.")
    lengths = {name: len(values) for name, values in {"prompts": prompts, "completions": completions, **columns}.items()}
    if len(set(lengths.values())) != 1 or not len(prompts):
        raise ValueError(f"rewards: prompts, completions and columns must be of one length and not empty, not {lengths}.")
    for name, reward in rewards.items():
        for column in needed(reward):
            if column not in columns:
                raise ValueError(
                    f"rewards: {name!r} needs {column!r}, which is neither a column of the rows nor an option it was given; "
                    f"nearest columns: {nearest(column, columns)}."
                )


def needed(reward: Reward) -> list[str]:
    """Return the names of what a reward asks for beside prompts and completions and has no default for."""
    parameters = list(inspect.signature(reward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return [name for name in named if name not in ("prompts", "completions")]


def _excerpt(value: Any, length: int = 80) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else shown[:length] + "…"
