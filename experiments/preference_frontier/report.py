"""Print and draw reward against divergence, from what `run.py` wrote.

Usage: python -m experiments.preference_frontier.report RESULTS.json [PLOT.png]
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
from scipy import stats

OFFLINE = ("DPO", "IPO", "KTO", "ORPO", "reward model, best of n", "reward model, RLOO")
"""What learns from labelled pairs; the others learn from the rewards of what they draw."""


def main() -> None:
    found = json.loads(pathlib.Path(sys.argv[1]).read_text())
    print("| method | KL: reward above the reference (less than the best at that KL), from the strongest hold to the weakest |" + "  |" * 5)
    print("|---" * 7 + "|")
    for method in methods(found):
        print(
            f"| {method} | " + " | ".join(cell(row) for row in sorted(of_method(found, method), key=lambda row: np.mean(row["kl"]))) + " |"
        )
    if len(sys.argv) > 2:
        draw(found, pathlib.Path(sys.argv[2]))


def methods(found: dict) -> list[str]:
    """Return the names, those that learn from pairs first."""
    names = dict.fromkeys(row["method"] for row in found["rows"])
    return sorted(names, key=lambda name: name not in OFFLINE)


def of_method(found: dict, method: str) -> list[dict]:
    """Return what came of one method, nearest to the reference first."""
    return sorted((row for row in found["rows"] if row["method"] == method), key=lambda row: np.mean(row["kl"]))


def cell(row: dict) -> str:
    return f"{np.mean(row['kl']):.2f}: {np.mean(row['gain']):.2f} ({np.mean(row['short']):.2f} ± {half(row['short']):.2f})"


def half(values: list[float]) -> float:
    """Return half of the 95 % interval of a mean, by Student's t."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def draw(found: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    best = {
        what: [np.mean([seed[n][what] for seed in found["optimum"]]) for n in range(len(found["optimum"][0]))] for what in ("kl", "gain")
    }
    titles = ("from 2,048 labelled pairs", "from the rewards of 128,000 responses of its own")
    for online, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.plot(best["kl"], best["gain"], color="black", linewidth=1, label="π ∝ π_ref exp(r/β)")
        for method in (name for name in methods(found) if (name not in OFFLINE) == online):
            rows = of_method(found, method)
            kl, gain, short = (np.array([row[what] for row in rows]) for what in ("kl", "gain", "short"))
            bars = [half(values) for values in short]
            axes.errorbar(kl.mean(1), gain.mean(1), bars, capsize=2, marker="o", markersize=4, linewidth=1, label=method)
        axes.set(xlabel="KL(π ‖ π_ref), nats", title=title, xlim=(0, 3.8))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower right")
    panels[0].set_ylabel("reward above the reference")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
