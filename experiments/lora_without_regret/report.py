"""Add finished runs to results.jsonl, print what all of them gave and draw held-out loss against learning rate.

Usage: python -m experiments.lora_without_regret.report [RUNS] [PLOT.png]
"""

import json
import pathlib
import sys

from experiments.lora_without_regret.config import RANKS
from experiments.method_table import table
from experiments.method_table.table import interval
from ftjax.logs.writers import read_jsonl

RESULTS = pathlib.Path(__file__).with_name("results.jsonl")
PEER = "lora_all-8"
WORDS = {
    "full": "full tuning",
    **{f"lora_all-{rank}": f"LoRA on all, rank {rank}" for rank in RANKS},
    "lora_attention-8": "LoRA on attention, rank 8",
    "lora_mlp-8": "LoRA on the MLP, rank 8",
}

Losses = dict[tuple[str, float, int], float]
"""`{(what, learning rate, seed): held-out loss at the end}`."""


def main() -> None:
    plots = [argument for argument in sys.argv[1:] if argument.endswith(".png")]
    found = known()
    for runs in sys.argv[1 : len(sys.argv) - len(plots)]:
        found |= finished(pathlib.Path(runs))
    rows = [{"what": what, "rate": rate, "seed": seed, "loss": loss} for (what, rate, seed), loss in sorted(found.items())]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = sorted({rate for _, rate, _ in found})
    print("| what |", " | ".join(f"{rate:g}" for rate in rates), "| best of each seed | … less rank 8's on all |")
    print("|---" * (len(rates) + 3) + "|")
    peer = best(found, PEER)
    for what, words in WORDS.items():
        cells = [[loss for (name, rate, _), loss in sorted(found.items()) if (name, rate) == (what, column)] for column in rates]
        mine = best(found, what)
        rows = [interval(losses, 3) if losses else "" for losses in cells]
        favourites = ", ".join(f"{rate:g}" for rate, _ in mine.values())
        apart = "" if what == PEER else interval([loss - peer[seed][1] for seed, (_, loss) in mine.items() if seed in peer], 3, sign="+")
        print(f"| {words} |", " | ".join(rows), f"| {favourites} | {apart} |")
    for plot in plots:
        draw(found, pathlib.Path(plot))


def known() -> Losses:
    """Return what results.jsonl has."""
    rows = read_jsonl(RESULTS) if RESULTS.exists() else []
    return {(row["what"], row["rate"], row["seed"]): row["loss"] for row in rows}


def finished(runs: pathlib.Path) -> Losses:
    """Return the losses of the runs that came to their end."""
    found: Losses = {}
    for workdir in table.finished(runs):
        name, _, seed = workdir.name.rpartition("-")
        if (workdir / "sweep.json").exists():
            for row in json.loads((workdir / "sweep.json").read_text())["members"]:
                found[name, row["options"]["optimizer.learning_rate"], int(seed)] = final(workdir, f"eval/loss/{row['member']}")
        else:
            what, rate = name.split("-", 1)
            found[what, float(rate), int(seed)] = final(workdir, "eval/loss")
    return found


def final(workdir: pathlib.Path, name: str) -> float:
    """Return the last value of a metric."""
    return round(next(row[name] for row in reversed(read_jsonl(workdir / "metrics.jsonl")) if name in row), 5)


def best(found: Losses, what: str) -> dict[int, tuple[float, float]]:
    """Return `{seed: (the best learning rate, its loss)}`."""
    seeds = sorted({seed for name, _, seed in found if name == what})
    mine = {seed: [(rate, loss) for (name, rate, of), loss in found.items() if (name, of) == (what, seed)] for seed in seeds}
    return {seed: min(pairs, key=lambda pair: pair[1]) for seed, pairs in mine.items()}


def draw(found: Losses, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for number, (what, words) in enumerate(WORDS.items()):
        for seed in sorted(best(found, what)):
            points = sorted((rate, loss) for (name, rate, of), loss in found.items() if (name, of) == (what, seed))
            style = {"color": f"C{number}", "linestyle": "--" if what == "full" else "-", "marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=words if seed == 0 else None, alpha=1.0 if seed == 0 else 0.5, **style)
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss at the end", ylim=(None, 4))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
