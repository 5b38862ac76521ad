"""Run the study: each rank a sweep over learning rates, full tuning one run for each. What is there already is not done again.

Usage: python -m experiments.lora_without_regret.run RUNS [--model MODEL]
"""

import argparse
import pathlib
import subprocess
import sys

from experiments.lora_without_regret.config import RANKS, RATES

CONFIG = pathlib.Path(__file__).with_name("config.py")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    rates = ",".join(f"{rate:g}" for rate in RATES["lora"])
    for rank in RANKS:
        finish(args, f"lora_all-{rank}", "lora_all", f"--config.lora.rank={rank}", f"--sweep=optimizer.learning_rate={rates}")
    for part in ("attention", "mlp"):
        finish(args, f"lora_{part}-8", f"lora_{part}", f"--sweep=optimizer.learning_rate={rates}")
    for rate in RATES["full"]:
        finish(args, f"full-{rate:g}", "full", f"--config.optimizer.learning_rate={rate}")


def finish(args, name: str, arg: str, *options: str) -> None:
    """Run, or go on, unless the run is done."""
    workdir = args.runs / name
    if (workdir / "loss.png").exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    model = [f"--config.model.name={args.model}"] if args.model else []
    command = [sys.executable, "-m", "ftjax", "train", f"--config={CONFIG}:{arg}", f"--workdir={workdir}", *options, *model]
    with open(workdir / "log.txt", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{name}: {'done' if code == 0 else f'exit code {code}, see log.txt'}", flush=True)


if __name__ == "__main__":
    main()
