"""Train with LoRA and with QLoRA on GSM8K, three seeds each, and draw both curves. What is there is not done again.

Usage: python -m experiments.qlora_gsm8k.run RUNS GSM8K_FOLDER [PLOT.png]
*Base + adapter + optimiser* is what a device holds from step to step, counted from shapes as `ftjax plan` does; *memory* is the most
that the process had.
"""

import pathlib
import statistics
import sys

from experiments import runs
from experiments.method_table.table import interval
from ftjax.logs.writers import read_jsonl

CONFIGS = {"LoRA": "sft_smollm2_gsm8k", "QLoRA (nf4)": "qlora_smollm2_gsm8k"}
SEEDS = (0, 1, 2)
FIELDS = (
    *("--config.steps=100", "--config.data.batch_size=1", "--config.optimizer.warmup_steps=10", "--config.logging.every_steps=5"),
    *("--config.eval.every_steps=25", "--config.eval.batches=12", "--config.checkpoint.every_steps=0"),
    *("--config.eval.generate.examples=64", "--config.eval.generate.max_tokens=160", "--config.logging.tensorboard=False"),
)


def main() -> None:
    folder, data = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    files = [f"--config.data.{name}.gsm8k.path={data / part}.jsonl" for name, part in (("sources", "train"), ("eval_sources", "test"))]
    where = {(name, seed): folder / f"{config}-{seed}" for seed in SEEDS for name, config in CONFIGS.items()}
    runs.finish(
        {path: [f"--config=configs/{CONFIGS[name]}.py", f"--config.seed={seed}", *FIELDS, *files] for (name, seed), path in where.items()}
    )
    columns = ("held-out loss", "… less LoRA's, same seed", "numeric match, % of 64: before", "after", "base + adapter + optimiser")
    print("| |", " | ".join((*columns, "memory", "tokens/s on a core")), "|")
    print("|---|---|---|---|---|---|---|---|")
    peer: list[float] = []
    for name in CONFIGS:
        read = [{key: row[key] for row in read_jsonl(where[name, seed] / "metrics.jsonl") for key in row} for seed in SEEDS]
        of = lambda key, read=read: [last[key] for last in read]  # noqa: E731
        scores = [interval([100 * value for value in of(f"eval/score_{when}")], 1) for when in ("before", "after")]
        losses = of("eval/loss")
        apart = interval([loss - other for loss, other in zip(losses, peer, strict=True)], 4, sign="+") if peer else ""
        peer = peer or losses
        cells = (
            interval(losses, 4),
            apart,
            *scores,
            held(CONFIGS[name]),
            f"{max(of('train/memory_gb')):.2f} GB",
            f"{statistics.median(of('train/tokens_per_second')):.0f}",
        )
        print("|", " | ".join((name, *cells)), "|")
    if len(sys.argv) > 3:
        draw(where, pathlib.Path(sys.argv[3]))


def held(config: str) -> str:
    """Return the bytes that a device holds of the base with its scales, the adapter and the optimiser, from shapes alone."""
    from absl import flags as absl_flags

    from ftjax.cli import build, footprint, plan, topology

    flags, argv = absl_flags.FlagValues(), ["plan", f"--config=configs/{config}.py", *FIELDS]
    plan.define_flags(flags, argv)
    flags(argv)
    here = topology.find("here")
    resolved = plan.resolved(flags.config, here)
    found = footprint.of(resolved, build.mesh(resolved, here.devices), here.kind)
    parts = found.base + found.scales, found.adapter, found.optimizer
    return f"{' + '.join(f'{size / 1e6:.1f}' for size in parts)} = {sum(parts) / 1e6:.1f} MB"


def draw(where: dict[tuple[str, int], pathlib.Path], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for part, axis in zip(("train/loss", "eval/loss"), axes, strict=True):
        for (name, seed), workdir in where.items():
            rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if part in row]
            label = name if seed == SEEDS[0] else None
            color = f"C{list(CONFIGS).index(name)}"
            axis.plot([row["step"] for row in rows], [row[part] for row in rows], color=color, label=label, alpha=0.7)
        axis.set(xlabel="step", ylabel=f"{part}, nats a token")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
