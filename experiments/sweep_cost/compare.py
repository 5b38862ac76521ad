"""Time a sweep beside its members run one after the other, each in a process of its own, and print their table.

Usage: python experiments/sweep_cost/compare.py MODEL.gguf [--members 8] [--steps 8] [--dtype float32]

Each runs `ftjax train` on the quick start's tasks, from the start of its process to its end: loading, compiling, one evaluation at the end
and writing the adapter included, generation left out. All share one compile cache, empty at first: a run of another seed finds the program
of the one before it, a run of another learning rate does not.
"""

import argparse
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
RATES, SEEDS = (3e-4, 1e-3, 2e-3, 4e-3), (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--members", type=int, choices=(2, 4, 8), default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    rates, seeds = RATES[: max(1, args.members // 2)], SEEDS
    with tempfile.TemporaryDirectory() as folder:
        common = [f"--compile_cache={folder}/compiled", *fields(args)]
        sweep = f"optimizer.learning_rate={','.join(map(str, rates))} seed={','.join(map(str, seeds))}"
        together = [run([*common, f"--workdir={folder}/sweep", f"--sweep={sweep}"])]
        alone = [
            run([*common, f"--workdir={folder}/{rate}-{seed}", f"--config.optimizer.learning_rate={rate}", f"--config.seed={seed}"])
            for rate, seed in itertools.product(rates, seeds)
        ]
    print("| what | wall time | time of the cores | peak memory of a process |")
    print("|---|---|---|---|")
    for name, runs in ((f"{args.members} members together", together), (f"{args.members} runs, one after the other", alone)):
        wall, busy, sizes = zip(*runs, strict=True)
        print(f"| {name} | {sum(wall):.0f} s | {sum(busy):.0f} s | {max(sizes) / 1e9:.2f} GB |")
    print("\nthe runs took", ", ".join(f"{wall:.0f} s" for wall, _, _ in alone))


def fields(args) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        f"--config.model.name={args.model}",
        f"--config.model.dtype={args.dtype}",
        f"--config.steps={args.steps}",
        f"--config.eval.every_steps={args.steps}",
        "--config.eval.batches=2",
        "--config.eval.generate.examples=0",
        "--config.logging.tensorboard=False",
    ]


def run(flags: list[str]) -> tuple[float, float, int]:
    """Return the seconds, those of the cores, and the peak bytes of one process."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ftjax", "train", *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"a run failed: {' '.join(flags)}")
    seconds, busy = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    print(f"{seconds:.0f} s, {busy:.0f} s of the cores, {usage.ru_maxrss * 1024 / 1e9:.2f} GB: {flags[-1]}", file=sys.stderr)
    return seconds, busy, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
