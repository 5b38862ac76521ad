"""GRPO with LoRA of two ranks, over NF4, and with full tuning: three seeds each, each run on a core of its own.

Usage: python -m experiments.grpo_sums.run [RUNS] [PLOT.png]
With a folder of runs, those that results.jsonl has not are done and added; then the table of all is printed and their rewards drawn.
Data: python experiments/method_table/data.py data/sums
"""

import itertools
import json
import pathlib
import statistics
import sys
from typing import Any

from experiments import runs
from experiments.method_table.table import interval
from ftjax.logs.writers import read_jsonl

RESULTS = pathlib.Path(__file__).with_name("results.jsonl")
STEPS = 40
"""By then the reward of 100 steps has come to where it stays."""
SEEDS = (0, 1, 2)
VARIANTS = {
    "LoRA, rank 16": (),
    "LoRA, rank 1": ("--config.lora.rank=1",),
    "QLoRA (nf4), rank 16": ("--config.methods=nf4,lora",),
    "full tuning": ("--config.methods=full", "--config.optimizer.learning_rate=2e-5"),  # a tenth of LoRA's: experiments/lora_without_regret
}
COMMON = (
    *("--config=configs/grpo_smollm2_sums.py", f"--config.steps={STEPS}", "--config.eval.every_steps=20"),
    *("--config.checkpoint.every_steps=0", "--config.logging.tensorboard=False"),
)
PEER = next(iter(VARIANTS))

Results = dict[tuple[str, int], dict[str, Any]]


def main() -> None:
    plots = [argument for argument in sys.argv[1:] if argument.endswith(".png")]
    results = known()
    for folder in sys.argv[1 : len(sys.argv) - len(plots)]:
        where = {(variant, seed): pathlib.Path(folder) / f"{number}-{seed}" for seed in SEEDS for number, variant in enumerate(VARIANTS)}
        left = {key: path for key, path in where.items() if key not in results}
        runs.finish({path: [*COMMON, *VARIANTS[variant], f"--config.seed={seed}"] for (variant, seed), path in left.items()})
        results |= {key: numbers(*key, path) for key, path in left.items() if runs.ended(path)}
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in results.values()))
    print("| | right before, % | after | … less rank 16's, same seed | reward of the last 10 steps | memory | seconds a step | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        if mine := {seed: row for (name, seed), row in sorted(results.items()) if name == variant}:
            print("|", " | ".join((variant, *cells(mine, {seed: results[PEER, seed] for seed in mine if (PEER, seed) in results}))), "|")
    for plot in plots:
        draw(results, pathlib.Path(plot))


def cells(mine: dict[int, dict[str, Any]], peer: dict[int, dict[str, Any]]) -> tuple[str, ...]:
    """Return a row of the table."""
    of = lambda name: [row[name] for row in mine.values()]  # noqa: E731
    apart = [100 * (mine[seed]["after"] - row["after"]) for seed, row in peer.items() if mine is not peer and mine[seed] is not row]
    return (
        interval([100 * score for score in of("before")], 1),
        interval([100 * score for score in of("after")], 1),
        interval(apart, 1, sign="+") if apart else "",
        interval([statistics.mean(rewards[-2:]) for rewards in of("rewards")], 3),
        f"{max(of('memory')):.2f} GB",
        f"{statistics.median(of('step_seconds')):.1f}",
        str(len(mine)),
    )


def known() -> Results:
    """Return what results.jsonl has."""
    return {(row["variant"], row["seed"]): row for row in (read_jsonl(RESULTS) if RESULTS.exists() else [])}


def numbers(variant: str, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Return what one run gave; `rewards` are means of five steps each."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    last = {name: row[name] for row in rows for name in row}
    reports = [row for row in rows if "train/reward" in row]
    paces = [
        (b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(reports)
    ]  # the median passes over evaluations
    return {
        "variant": variant,
        "seed": seed,
        "before": last["eval/score_before"],
        "after": last["eval/score_after"],
        "rewards": [round(row["train/reward"], 4) for row in reports],
        "finished": round(last["train/finished"], 4),
        "memory": round(last["train/memory_gb"], 3),
        "step_seconds": round(statistics.median(paces), 2),
    }


def draw(results: Results, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for number, variant in enumerate(VARIANTS):
        curves = [row["rewards"] for (name, _), row in sorted(results.items()) if name == variant]
        for at, curve in enumerate(curves):
            steps = [STEPS * (index + 1) / len(curve) for index in range(len(curve))]
            axes.plot(steps, curve, color=f"C{number}", alpha=0.35, linewidth=1)
            if at == 0:
                means = [statistics.mean(values) for values in zip(*curves, strict=True)]
                axes.plot(steps, means, color=f"C{number}", label=variant, linewidth=2)
    axes.set(xlabel="step", ylabel="mean reward of samples")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
