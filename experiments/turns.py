"""Systems side by side: run their commands in turn, each in a process of its own, and gather what each says of itself.

A command prints one line of JSON last, with at least `system`, `seconds` (of each repetition) and `tokens` (of one). Whatever drifts on the
machine then falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""Has glibc keep the memory that a step frees, in any process: what `ftjax.cli.runtime.keep_memory` does for ours."""


class Turn(NamedTuple):
    """One command."""

    command: Sequence[str]
    environment: Mapping[str, str] = {}
    note: str = ""
    """Said after the name of its system."""


def arguments(work: str) -> argparse.ArgumentParser:
    """Return the arguments that every comparison takes; `work` is the name of the file that its systems are given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument(work)
    parser.add_argument("--jax", action="append", default=[])
    parser.add_argument("--torch")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def peer(command: Sequence, name: str) -> Turn:
    """Return the turn of a peer named by its dtype and options: "bfloat16+autocast"; `keeping` is no option of it but of the C library."""
    dtype, *options = name.split("+")
    keeping = "keeping" in options
    flags = [f"--{option}" for option in options if option != "keeping"]
    return Turn([*command, "--dtype", dtype, *flags], KEEPING if keeping else {}, ", memory kept" if keeping else "")


def run(turns: Sequence[Turn], *, rounds: int) -> list[dict[str, Any]]:
    """Return what each command says in each round, one round after the other; a command that fails shows what it wrote, and ends it all."""
    found = []
    for _ in range(rounds):
        for turn in turns:
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", **turn.environment}
            process = subprocess.run(list(map(str, turn.command)), stdout=subprocess.PIPE, text=True, env=environment)
            if process.returncode:
                raise SystemExit(f"failed: {' '.join(map(str, turn.command))}\n{process.stdout}")
            result = json.loads(process.stdout.splitlines()[-1])
            result["system"] += turn.note
            found.append(result)
            print(f"{result['system']}: {spread(rates(result))} tokens/s, {result['peak_gb']:.2f} GB", file=sys.stderr, flush=True)
    return found


def by_system(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the results of each system, in the order in which the systems first came."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["system"], []).append(result)
    return found


def rates(*results: Mapping[str, Any]) -> list[float]:
    """Return the tokens a second of every repetition."""
    return [result["tokens"] / seconds for result in results for seconds in result["seconds"]]


def middle(results: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median of something over runs."""
    return statistics.median(result[name] for result in results)


def spread(values: Sequence[float], *, digits: int = 0) -> str:
    """Return the median and the range.

    >>> spread([3.0, 1.0, 2.0])
    '2 (1–3)'
    """
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
