"""What an epoch takes when rows are made in several ways: the time of each width of batch, measured, times how often an epoch has it."""

import collections
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

HEADER = "| rows are | steps an epoch | positions filled | seconds an epoch | tokens/s | against the first |\n|---|---|---|---|---|---|"


def compare(ways: Mapping[str, tuple[Any, Callable]], state: Any, frozen: Any, *, tokens: int, repeats: int) -> None:
    """Print a Markdown table of `{what rows are: (loader, train step)}`; `tokens` are those of an epoch."""
    print(HEADER)
    first = None
    for name, (loader, step) in ways.items():
        widths = list(map(int, loader.plan(0)[1].widths))
        total = 0.0
        for width, count in collections.Counter(widths).items():
            seconds, state = timed(step, state, frozen, jax.device_put(loader.batch(widths.index(width))), repeats=repeats)
            total += count * seconds
        first = first or total
        filled, ratio = f"{100 * loader.efficiency:.1f} %", f"{total / first:.2f} x"
        print(f"| {name} | {loader.steps_per_epoch} | {filled} | {total:.0f} | {tokens / total:.0f} | {ratio} |", flush=True)


def timed(step: Callable, state: Any, frozen: Any, batch: Any, *, repeats: int) -> tuple[float, Any]:
    """Return the median of the seconds that a step takes, the one that compiles left out, and the state after all of them."""
    runs = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        runs.append(time.perf_counter() - start)
    return statistics.median(runs[1:]), state
