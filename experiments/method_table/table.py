"""Add finished runs to results.jsonl, print the table of all of them and draw their losses beside LoRA's.

Usage: python -m experiments.method_table.table [RUNS] [PLOT.png]
"""

import json
import math
import pathlib
import re
import statistics
import sys
from typing import Any

from experiments.method_table.config import METHODS
from experiments.runs import ended
from ftjax.logs.writers import read_jsonl

RESULTS = pathlib.Path(__file__).with_name("results.jsonl")
# Two-sided 95 % quantiles of Student's t for one and two degrees of freedom.
STUDENT = {1: 12.7, 2: 4.30}

PEER = "lora"
"""The seed decides the order of the data, which moves all methods alike: a difference within a seed says more than a mean over seeds."""

Row = dict[str, Any]


def main() -> None:
    plots = [argument for argument in sys.argv[1:] if argument.endswith(".png")]
    results = known()
    for runs in sys.argv[1 : len(sys.argv) - len(plots)]:
        results |= {(row["method"], row["rate"], row["seed"]): row for row in map(numbers, finished(pathlib.Path(runs)))}
    RESULTS.write_text("".join(json.dumps(results[key]) + "\n" for key in sorted(results)))
    rows = [row for method in METHODS if (row := summary(list(results.values()), method))]
    peer = next((row for row in rows if row["method"] == PEER), None)
    print("| method | learning rate | trained | memory | tokens/s | held-out loss | … less LoRA's, same seed | exact match, % | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: statistics.mean(row["loss"])):
        memory, speed, scores = max(row["memory"]), max(row["speed"]), [100 * score for score in row["score"]]
        cells = (
            f"`{row['method']}`",
            f"{row['rate']:g}{edge(row['method'], row['rate'])}",
            f"{row['trained']:,}",
            f"{memory:.2f} GB",
            f"{speed:.0f}",
            interval(row["loss"], 3),
        )
        print("|", " | ".join((*cells, against(row, peer), interval(scores, 1), str(len(scores)))), "|")
    for plot in plots:
        draw(rows, peer, pathlib.Path(plot))


def known() -> dict[tuple[str, float, int], Row]:
    """Return the runs of results.jsonl."""
    rows = read_jsonl(RESULTS) if RESULTS.exists() else []
    return {(row["method"], row["rate"], row["seed"]): row for row in rows}


def finished(runs: pathlib.Path) -> list[pathlib.Path]:
    """Return the workdirs of the runs that came to their end."""
    return sorted(path for path in runs.iterdir() if ended(path))


def numbers(workdir: pathlib.Path) -> Row:
    """Return what one run gave."""
    method, rate, seed = re.fullmatch(r"(.+?)-([0-9.e-]+)-(\d+)", workdir.name).groups()
    last = {name: row[name] for row in read_jsonl(workdir / "metrics.jsonl") for name in row}
    speeds = [row["train/tokens_per_second"] for row in read_jsonl(workdir / "metrics.jsonl") if "train/tokens_per_second" in row]
    record = json.loads(next((workdir / "checkpoints").glob("*/record.json")).read_text())
    sizes = [re.search(r"\[(.*)\]", leaf)[1] for path, leaf in record["leaves"].items() if "trainable" in path]
    return {
        "method": method,
        "rate": float(rate),
        "seed": int(seed),
        "loss": round(last["eval/loss"], 5),
        "score": last["eval/score_after"],
        "memory": round(last["train/memory_gb"], 3),
        "speed": round(statistics.median(speeds[1:] or speeds), 1),
        "trained": sum(math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes),
    }


def summary(results: list[Row], method: str) -> Row | None:
    """Return what the runs of a method at its better learning rate gave, that of the first seed's lower loss; None if there is none."""
    mine = [row for row in results if row["method"] == method]
    if not mine:
        return None
    rate = min((row for row in mine if row["seed"] == 0), key=lambda row: row["loss"])["rate"]
    chosen = sorted((row for row in mine if row["rate"] == rate), key=lambda row: row["seed"])
    columns = {name: [row[name] for row in chosen] for name in ("seed", "loss", "score", "memory", "speed")}
    return {"method": method, "rate": rate, "trained": chosen[0]["trained"], **columns}


def edge(method: str, rate: float) -> str:
    """Return an arrow to where no rate was tried, if the best one is at that end."""
    tried = METHODS[method][1]
    if len(tried) == 1:
        return ""
    return " ↓" if rate == min(tried) else " ↑" if rate == max(tried) else ""


def against(row: Row, peer: Row | None) -> str:
    """Return the mean of `apart` with its interval; nothing for the peer itself."""
    found = apart(row, peer)
    return interval(found, 3, sign="+") if found and row is not peer else ""


def apart(row: Row, peer: Row | None) -> list[float]:
    """Return the differences of a method's losses to the peer's of the same seeds."""
    theirs = {} if peer is None else dict(zip(peer["seed"], peer["loss"], strict=True))
    return [loss - theirs[seed] for seed, loss in zip(row["seed"], row["loss"], strict=True) if seed in theirs]


def interval(values: list[float], digits: int, *, sign: str = "") -> str:
    """Return the mean and the half width of its 95 % confidence interval, by Student's t."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def draw(rows: list[Row], peer: Row | None, path: pathlib.Path) -> None:
    """Draw each method's losses less the peer's of the same seeds, and its exact match: a dot a seed, a bar over them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: statistics.mean(row["loss"]), reverse=True)
    columns = {
        f"held-out loss, less that of {PEER} with the same seed": [apart(row, peer) for row in rows],
        "exact match, % of 256": [[100 * score for score in row["score"]] for row in rows],
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.24 * len(rows) + 1), sharey=True, layout="constrained")
    for axis, (words, values) in zip(axes, columns.items(), strict=True):
        for height, found in enumerate(values):
            axis.plot([min(found), max(found)], [height] * 2, color="C0", alpha=0.4)
            axis.plot(found, [height] * len(found), "o", color="C0", markersize=4)
        axis.set(xlabel=words, ylim=(-0.7, len(rows) - 0.3))
        axis.grid(alpha=0.3)
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
