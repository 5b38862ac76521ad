"""Run every method: seed 0 of all at each learning rate, then seeds 1 and 2 at the better one. What is there is not done again.

Usage: python -m experiments.method_table.run RUNS [--model MODEL] [METHOD …]
Each core of this process has a run of its own. A run that was interrupted goes on; one that results.jsonl has is not done again. The better
learning rate is the one with the lower held-out loss.
"""

import argparse
import concurrent.futures
import itertools
import os
import pathlib
import queue
import subprocess
import sys

from experiments.method_table import table
from experiments.method_table.config import METHODS
from ftjax.logs.writers import read_jsonl

HERE = pathlib.Path(__file__).parent
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    methods = args.methods or list(METHODS)
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def losses(runs: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], float]:
        with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
            return dict(zip(runs, pool.map(lambda run: finished(args, cores, *run), runs), strict=True))

    first = losses([(method, rate, SEEDS[0]) for method in methods for rate in METHODS[method][1]])
    better = {method: min(METHODS[method][1], key=lambda rate, method=method: first[method, rate, SEEDS[0]]) for method in methods}
    losses([(method, better[method], seed) for seed, method in itertools.product(SEEDS[1:], methods)])


def finished(args, cores: queue.Queue[int], method: str, rate: float, seed: int) -> float:
    """Run on a core of its own if need be; return the held-out loss at the end, infinite for a run that failed."""
    if (row := table.known().get((method, rate, seed))) is not None:
        return row["loss"]
    workdir = args.runs / f"{method}-{rate:g}-{seed}"
    if not (workdir / "loss.png").exists():
        options = [f"--config.optimizer.learning_rate={rate}", f"--config.seed={seed}", f"--workdir={workdir}"]
        options += [f"--config.model.name={args.model}"] if args.model else []
        workdir.mkdir(parents=True, exist_ok=True)
        core = cores.get()
        with open(workdir / "log.txt", "a") as log:
            command = [sys.executable, "-m", "ftjax", "train", f"--config={HERE / 'config.py'}:{method}", *options]
            pinned = {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}
            code = subprocess.run(command, **pinned).returncode
        cores.put(core)
        print(f"{workdir.name}: {'done' if code == 0 else f'exit code {code}, see log.txt'}", flush=True)
    rows = read_jsonl(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    return next((row["eval/loss"] for row in reversed(rows) if "eval/loss" in row), float("inf"))


if __name__ == "__main__":
    main()
