"""Run the study: each rank a sweep over learning rates, full tuning one run for each. What is there already is not done again.

Usage: python -m experiments.lora_without_regret.run RUNS [--model MODEL]
Each core of this process has a run of its own. Seed 0 goes over all rates, the others over those about the best.
"""

import argparse
import pathlib

from experiments import runs
from experiments.lora_without_regret import report
from experiments.lora_without_regret.config import NEAR, RANKS, RATES, SEEDS

CONFIG = pathlib.Path(__file__).with_name("config.py")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    model = [f"--config.model.name={args.model}"] if args.model else []
    wanted, known = {}, report.known()
    for seed in SEEDS:
        common = [f"--config.seed={seed}", *model]
        rates = RATES if seed == SEEDS[0] else NEAR
        for part, rank in (*(("all", rank) for rank in RANKS), ("attention", 8), ("mlp", 8)):
            left = [f"{rate:g}" for rate in rates["lora"] if (f"lora_{part}-{rank}", rate, seed) not in known]
            if left:
                sweep = [f"--config.lora.rank={rank}", f"--sweep=optimizer.learning_rate={','.join(left)}"]
                wanted[f"lora_{part}-{rank}-{seed}"] = [f"--config={CONFIG}:lora_{part}", *sweep, *common]
        for rate in rates["full"]:
            if ("full", rate, seed) not in known:
                wanted[f"full-{rate:g}-{seed}"] = [f"--config={CONFIG}:full", f"--config.optimizer.learning_rate={rate}", *common]
    runs.finish({args.runs / name: options for name, options in wanted.items()})


if __name__ == "__main__":
    main()
