"""Print what the runs gave and draw held-out loss against learning rate.

Usage: python -m experiments.lora_without_regret.report RUNS [PLOT.png]
"""

import json
import pathlib
import sys

from ftjax.logs.writers import read_jsonl


def main() -> None:
    runs = pathlib.Path(sys.argv[1])
    found = {name: points for name, points in curves(runs).items() if points}
    rates = sorted({rate for points in found.values() for rate in points})
    print("| what | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for name, points in found.items():
        best = min(points.values())
        cells = [cell(points[rate], best) if rate in points else "" for rate in rates]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if len(sys.argv) > 2:
        draw(found, pathlib.Path(sys.argv[2]))


def cell(loss: float, best: float) -> str:
    return f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"


def curves(runs: pathlib.Path) -> dict[str, dict[float, float]]:
    """Return `{what: {learning rate: loss at the end}}`."""
    found: dict[str, dict[float, float]] = {}
    for workdir in sorted(path.parent for path in runs.glob("*/loss.png")):
        kind, _, last = workdir.name.partition("-")
        if (workdir / "sweep.json").exists():
            for row in json.loads((workdir / "sweep.json").read_text())["members"]:
                options = row["options"]
                rank = options.get("lora.rank", last)
                name = f"{kind}, rank {rank}"
                found.setdefault(name, {})[options["optimizer.learning_rate"]] = final(workdir, row["member"])
        else:
            found.setdefault(kind, {})[float(last)] = final(workdir)
    return found


def final(workdir: pathlib.Path, member: int | None = None) -> float:
    """Return the last held-out loss of a run, or of a member of a sweep."""
    name = "eval/loss" if member is None else f"eval/loss/{member}"
    return next(row[name] for row in reversed(read_jsonl(workdir / "metrics.jsonl")) if name in row)


def draw(found: dict[str, dict[float, float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, points in found.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name, linestyle="--" if name == "full" else "-")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss at the end", ylim=(None, 4))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
