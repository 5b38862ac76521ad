"""Print how much was remembered and draw it against what there was to remember.

Usage: python -m experiments.lora_capacity.report RUNS [PLOT.png]
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from scipy import stats

from experiments.lora_capacity.config import DIGITS, DRAWS, RANKS, RATES, SIZES
from experiments.lora_capacity.run import BEST_RATE, LONG_STEPS
from ftjax import models, peft, tree
from ftjax.logs.writers import read_jsonl

BITS = DIGITS * math.log2(10)
"""Of a fact."""
Found = dict[tuple[str, int, int, float], float]
"""`{(what is trained, facts, draw, learning rate): bits remembered}`."""


def main() -> None:
    found, numbers = read(pathlib.Path(sys.argv[1])), trained_numbers()
    print("| trained | numbers | " + " | ".join(f"{size} facts, {size * BITS:,.0f} bits" for size in SIZES) + " | most bits a number |")
    print("|---" * (len(SIZES) + 3) + "|")
    for what, count in numbers.items():
        kept = [over_draws(found, what, size) for size in SIZES]
        most = max((np.mean(values) for values in kept if len(values)), default=math.nan) / count
        cells = [interval(100 * values / (size * BITS)) + " %" for values, size in zip(kept, SIZES, strict=True)]
        print(f"| {what} | {count:,} | " + " | ".join(cells) + f" | {most:.2f} |")
    print(f"\nBits of {256 * BITS:,.0f} remembered on the first draw of 256 facts, by learning rate:\n")
    print("| trained | " + " | ".join(f"{rate:g}" for rate in RATES) + " |")
    print("|---" * (len(RATES) + 1) + "|")
    for what in numbers:
        print(f"| {what} | " + " | ".join(f"{found.get((what, 256, 0, rate), math.nan):,.0f}" for rate in RATES) + " |")
    longer = {what: bits for (what, _), bits in remembered(pathlib.Path(sys.argv[1]) / "long" / "sweep.json", SIZES[-1])}
    for what, bits in longer.items():
        print(f"\n{what}, {SIZES[-1]} facts, {LONG_STEPS:,} steps: {bits:,.0f} bits, {100 * bits / (SIZES[-1] * BITS):.1f} %")
    if len(sys.argv) > 2:
        draw(found, numbers, longer, pathlib.Path(sys.argv[2]))


def read(runs: pathlib.Path) -> Found:
    found = {}
    for path in runs.glob("*-*-*/sweep.json"):
        size, number = (int(word) for word in path.parent.name.split("-")[1:])
        found |= {(what, size, number, rate): bits for (what, rate), bits in remembered(path, size)}
    return found


def remembered(path: pathlib.Path, size: int) -> Iterator[tuple[tuple[str, float], float]]:
    """Yield what was trained, at what rate, and the bits remembered at the end: those of the facts, less what is lacking of them."""
    last = [row for row in read_jsonl(path.with_name("metrics.jsonl")) if "eval/loss/0" in row][-1]
    for member in json.loads(path.read_text())["members"]:
        rank, rate = (member["options"].get(name) for name in ("lora.rank", "optimizer.learning_rate"))
        tokens = DIGITS + 1  # the loss is a mean over the digits and the end marker
        lacking = tokens * last[f"eval/loss/{member['member']}"] / math.log(2)
        yield (f"LoRA, rank {rank}" if rank else "full", rate), size * (BITS - lacking)


def trained_numbers() -> dict[str, int]:
    model = models.build(models.preset("tiny-llama"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    size = lambda method: tree.size(jax.eval_shape(lambda params: method.init(jax.random.key(0), params)[1], params))  # noqa: E731
    return {f"LoRA, rank {rank}": size(peft.lora("all-linear", rank=rank)) for rank in RANKS} | {"full": size(peft.full(".*"))}


def over_draws(found: Found, what: str, size: int) -> np.ndarray:
    return np.array([found[key] for number in range(DRAWS) if (key := (what, size, number, BEST_RATE)) in found])


def half(values: np.ndarray) -> float:
    """Return half of the 95 % interval of a mean, by Student's t; NaN of less than two values."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def interval(values: np.ndarray) -> str:
    return f"{np.mean(values):.1f} ± {half(values):.1f}" if len(values) else "–"


def draw(found: Found, numbers: dict[str, int], longer: dict[str, float], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for what, count in numbers.items():
        points = [(size * BITS, values) for size in SIZES if len(values := over_draws(found, what, size))]
        style = {"label": f"{what}: {count:,} numbers", "marker": "o", "markersize": 4, "linestyle": "--" if what == "full" else "-"}
        told, kept = np.array([told for told, _ in points]), np.array([values.mean() for _, values in points])
        error = np.array([half(values) for _, values in points])
        for axes, unit in ((absolute, 1), (relative, count)):
            line = axes.errorbar(told / unit, kept / unit, error / unit, capsize=2, **style)
            if what in longer:
                axes.plot(SIZES[-1] * BITS / unit, longer[what] / unit, "x", color=line[0].get_color())
    for axes, over, at in ((absolute, "", 1000), (relative, " per trained number", 1)):
        axes.axline((at, at), (2 * at, 2 * at), color="gray", linewidth=0.8, zorder=0)
        axes.set(xlabel=f"bits to remember{over}", ylabel=f"bits remembered{over}", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    absolute.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
