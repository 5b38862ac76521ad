"""Run every method: seed 0 of all at each learning rate, then seeds 1 and 2 at the better one. What is there is not done again.

Usage: python -m experiments.method_table.run RUNS [--model MODEL] [METHOD …]
A run that was interrupted goes on. The better learning rate is the one with the lower held-out loss.
"""

import argparse
import pathlib
import subprocess
import sys

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
    chosen = {}
    for method in args.methods or METHODS:
        losses = {rate: finished(args, method, rate, SEEDS[0]) for rate in METHODS[method][1]}
        chosen[method] = min(losses, key=losses.get)
    for seed in SEEDS[1:]:
        for method, rate in chosen.items():
            finished(args, method, rate, seed)


def finished(args, method: str, rate: float, seed: int) -> float:
    """Run if need be; return the held-out loss at the end, infinite for a run that failed."""
    workdir = args.runs / f"{method}-{rate:g}-{seed}"
    if not (workdir / "loss.png").exists():
        options = [f"--config.optimizer.learning_rate={rate}", f"--config.seed={seed}", f"--workdir={workdir}"]
        options += [f"--config.model.name={args.model}"] if args.model else []
        workdir.mkdir(parents=True, exist_ok=True)
        with open(workdir / "log.txt", "a") as log:
            command = [sys.executable, "-m", "ftjax", "train", f"--config={HERE / 'config.py'}:{method}", *options]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{workdir.name}: {'done' if code == 0 else f'exit code {code}, see log.txt'}", flush=True)
    rows = read_jsonl(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    return next((row["eval/loss"] for row in reversed(rows) if "eval/loss" in row), float("inf"))


if __name__ == "__main__":
    main()
