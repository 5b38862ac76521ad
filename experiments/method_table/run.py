"""Run every method: seed 0 of all at each learning rate, then seeds 1 and 2 at the better one. What is there is not done again.

Usage: python -m experiments.method_table.run RUNS [--model MODEL] [METHOD …]
Each core of this process has a run of its own. A run that was interrupted goes on; one that results.jsonl has is not done again. The better
learning rate is the one with the lower held-out loss.
"""

import argparse
import itertools
import pathlib

from experiments import runs
from experiments.method_table import table
from experiments.method_table.config import METHODS

HERE = pathlib.Path(__file__).parent
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    methods = args.methods or list(METHODS)
    first = losses(args, [(method, rate, SEEDS[0]) for method in methods for rate in METHODS[method][1]])
    better = {method: min(METHODS[method][1], key=lambda rate, method=method: first[method, rate, SEEDS[0]]) for method in methods}
    losses(args, [(method, better[method], seed) for seed, method in itertools.product(SEEDS[1:], methods)])


def losses(args, wanted: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], float]:
    """Run what is not known yet; return the held-out losses at the end, infinite for a run that failed."""
    known, new = table.known(), {}
    for key in wanted:
        if key not in known:
            method, rate, seed = key
            new[key] = args.runs / f"{method}-{rate:g}-{seed}"
    model = [f"--config.model.name={args.model}"] if args.model else []
    runs.finish(
        {
            workdir: [
                f"--config={HERE / 'config.py'}:{method}",
                f"--config.optimizer.learning_rate={rate}",
                f"--config.seed={seed}",
                *model,
            ]
            for (method, rate, seed), workdir in new.items()
        }
    )
    ended = {key: table.numbers(workdir) for key, workdir in new.items() if runs.ended(workdir)}
    return {key: (known | ended).get(key, {"loss": float("inf")})["loss"] for key in wanted}


if __name__ == "__main__":
    main()
