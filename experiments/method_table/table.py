"""Print the table of the finished runs and draw exact match against what is trained.

Usage: python -m experiments.method_table.table RUNS [PLOT.png]
"""

import json
import math
import pathlib
import re
import statistics
import sys

from experiments.method_table.config import METHODS
from ftjax.logs.writers import read_jsonl

# Two-sided 95 % quantiles of Student's t for one and two degrees of freedom.
STUDENT = {1: 12.7, 2: 4.30}


def main() -> None:
    runs = pathlib.Path(sys.argv[1])
    rows = [row for method in METHODS if (row := summary(runs, method))]
    print("| method | learning rate | trained | memory | tokens/s | held-out loss | exact match, % | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -statistics.mean(row["scores"])):
        memory, speed, scores = max(row["memory"]), statistics.median(row["speed"]), [100 * score for score in row["scores"]]
        cells = (f"`{row['method']}`", f"{row['rate']:g}", f"{row['trained']:,}", f"{memory:.2f} GB", f"{speed:.0f}")
        print("|", " | ".join((*cells, interval(row["losses"], 3), interval(scores, 1), str(len(scores)))), "|")
    if len(sys.argv) > 2:
        draw(rows, pathlib.Path(sys.argv[2]))


def summary(runs: pathlib.Path, method: str) -> dict | None:
    """Return what the runs of a method at its better learning rate gave; None if there is none."""
    by_rate: dict[float, list[dict]] = {}
    for rate in METHODS[method][1]:
        found = [numbers(path) for path in sorted(runs.glob(f"{method}-{rate:g}-*")) if (path / "loss.png").exists()]
        if found:
            by_rate[rate] = found
    if not by_rate:
        return None
    rate = min(by_rate, key=lambda rate: by_rate[rate][0]["losses"])
    columns = {name: [run[name] for run in by_rate[rate]] for name in ("losses", "scores", "memory", "speed")}
    return {"method": method, "rate": rate, "trained": by_rate[rate][0]["trained"], **columns}


def numbers(workdir: pathlib.Path) -> dict:
    """Return what one run gave."""
    last = {name: row[name] for row in read_jsonl(workdir / "metrics.jsonl") for name in row}
    speeds = [row["train/tokens_per_second"] for row in read_jsonl(workdir / "metrics.jsonl") if "train/tokens_per_second" in row]
    record = json.loads(next((workdir / "checkpoints").glob("*/record.json")).read_text())
    sizes = [re.search(r"\[(.*)\]", leaf)[1] for path, leaf in record["leaves"].items() if "trainable" in path]
    return {
        "losses": last["eval/loss"],
        "scores": last["eval/score_after"],
        "memory": last["train/memory_gb"],
        "speed": statistics.median(speeds[1:] or speeds),
        "trained": sum(math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes),
    }


def interval(values: list[float], digits: int) -> str:
    """Return the mean and the half width of its 95 % confidence interval, by Student's t."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def draw(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        scores = [100 * score for score in row["scores"]]
        mean = statistics.mean(scores)
        axes.errorbar(row["trained"], mean, [[mean - min(scores)], [max(scores) - mean]], fmt="o", capsize=3)
        axes.annotate(row["method"], (row["trained"], mean), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="exact match, % of 256 (bars: range over seeds)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
