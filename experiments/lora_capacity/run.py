"""Run the study: all learning rates on 256 facts, the best of them on all others. What is there already is not done again.

Usage: python -m experiments.lora_capacity.run RUNS
"""

import pathlib
import subprocess
import sys

from experiments.lora_capacity.config import DRAWS, RANKS, RATES, SIZES
from experiments.runs import ended

CONFIG = pathlib.Path(__file__).with_name("config.py")
BEST_RATE = 3e-3
"""See the README."""
LONG_STEPS = 8144
"""Four times those of most facts: is it room or time that they lack?"""


def main() -> None:
    runs = pathlib.Path(sys.argv[1])
    base, model = runs / "base", runs / "model"
    train(base, "base")
    if not model.exists():
        ftjax("export", f"--workdir={base}", f"--output={model}", log=base / "log.txt")
    for draw in range(DRAWS):
        for size in SIZES:
            for kind in ("full", "lora"):
                rates = RATES if (size, draw) == (256, 0) else (BEST_RATE,)
                sweep = f"optimizer.learning_rate={listed(rates)}" + (f" lora.rank={listed(RANKS)}" if kind == "lora" else "")
                name = f"{kind}-{size}-{draw}"
                train(runs / name, name, f"--sweep={sweep}", f"--config.model.name={model}")
    sweep = f"--sweep=lora.rank=8,16 optimizer.learning_rate={BEST_RATE:g}"
    train(runs / "long", f"lora-{SIZES[-1]}-0", sweep, f"--config.steps={LONG_STEPS}", f"--config.model.name={model}")


def listed(values) -> str:
    return ",".join(f"{value:g}" for value in values)


def train(workdir: pathlib.Path, arg: str, *options: str) -> None:
    """Run, or go on, unless the run is done."""
    if not ended(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        ftjax("train", f"--config={CONFIG}:{arg}", f"--workdir={workdir}", *options, log=workdir / "log.txt")
        print(f"{arg}: done", flush=True)


def ftjax(*arguments: str, log: pathlib.Path) -> None:
    with open(log, "a") as file:
        code = subprocess.run([sys.executable, "-m", "ftjax", *arguments], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"ftjax {arguments[0]}: exit code {code}, see {log}")


if __name__ == "__main__":
    main()
