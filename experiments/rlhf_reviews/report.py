"""Print and draw the known reward against the divergence of each policy, and of best-of-n by the reward model.

Usage: python -m experiments.rlhf_reviews.report MODEL FOLDER RESULTS.json REWARD_RUN NAME=RUN … [--plot PLOT.png]
Each policy writes `SAMPLES` completions of each held-out prompt; what RESULTS.json has is not written again.
"""

import argparse
import json
import math
import pathlib

import numpy as np

from experiments.best_of_n.report import kl_bound
from experiments.rlhf_reviews.samples import Start, Written
from ftjax.cli import critic
from ftjax.logs.writers import read_jsonl

SAMPLES, CANDIDATES = 4, 16
SIZES = (2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("reward", help="the run of the reward model")
    parser.add_argument("policies", nargs="*", help="NAME=RUN")
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {}
    policies = dict(policy.split("=", 1) for policy in args.policies)
    if left := [name for name in ("start", *policies) if name not in found]:
        start, judge = Start(args.model), critic.load(args.reward, batch_size=32)
        prompts = [json.loads(line)["prompt"] for line in (args.folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in left:
            samples = CANDIDATES if name == "start" else SAMPLES
            params = start.found.params if name == "start" else start.policy(policies[name])
            written = start.write(params, prompts, samples=samples, seed=2)
            learnt = np.array(judge([prompt for prompt in prompts for _ in range(samples)], written.texts))
            found[name] = point(written, learnt, samples)
            if name == "start":
                found |= {f"best of {n}": chosen(written, learnt, n) for n in SIZES}
                found["start"]["agreement"] = agreement(written.rewards.reshape(-1, 2), learnt.reshape(-1, 2))
            args.results.write_text(json.dumps(found, indent=1) + "\n")
    print("| policy | known reward | learnt reward | KL from the start, nats a completion |\n|---|---|---|---|")
    for name, row in found.items():
        kl = f"≤ {row['kl']:.2f}" if name.startswith("best") else f"{row['kl']:.2f} ± {row['kl_half']:.2f}"
        print(f"| {name} | {row['known']:.3f} ± {row['known_half']:.3f} | {row['learnt']:.3f} | {kl} |")
    if args.plot:
        draw(found, {name: path(pathlib.Path(run)) for name, run in policies.items()}, args.plot)


def point(written: Written, learnt: np.ndarray, samples: int) -> dict[str, float]:
    """Return the means, with half of their 95 % intervals over prompts."""
    known, known_half = mean(written.rewards.reshape(-1, samples).mean(axis=1))
    kl, kl_half = mean(written.logratios.reshape(-1, samples).mean(axis=1))
    return {"known": known, "known_half": known_half, "learnt": float(learnt.mean()), "kl": kl, "kl_half": kl_half}


def chosen(written: Written, learnt: np.ndarray, n: int) -> dict[str, float]:
    """Return what the best of n by the learnt reward is worth; each prompt's candidates are 16 / n draws of n."""
    groups = learnt.reshape(-1, CANDIDATES // n, n)
    best = groups.argmax(axis=-1)[..., None]
    known, half = mean(np.take_along_axis(written.rewards.reshape(groups.shape), best, axis=-1).mean(axis=(1, 2)))
    return {"known": known, "known_half": half, "learnt": float(groups.max(axis=-1).mean()), "kl": kl_bound(n)}


def mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def agreement(known: np.ndarray, learnt: np.ndarray) -> float:
    """Return the share of pairs `[n, 2]` whose known rewards differ in which the learnt one is larger where the known one is."""
    differs = known[:, 0] != known[:, 1]
    return float(((known[:, 0] > known[:, 1]) == (learnt[:, 0] > learnt[:, 1]))[differs].mean())


def path(workdir: pathlib.Path) -> list[tuple[float, float]]:
    """Return divergence and known reward of what a policy sampled on its way; nothing of a run that samples nothing."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return [(row["train/kl/sampled"], row["train/rewards/sentiment"]) for row in rows if "train/kl/sampled" in row]


def draw(found: dict[str, dict[str, float]], paths: dict[str, list[tuple[float, float]]], file: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for number, way in enumerate(filter(None, paths.values())):
        label = "PPO on its way, training prompts" if number == 0 else None
        axes.plot(*zip(*way, strict=True), color="gray", linewidth=0.8, alpha=0.6, label=label)
    kinds = {"best of n": [name for name in found if name.startswith(("start", "best"))]}
    for name in found:
        if not name.startswith(("start", "best")):
            kinds.setdefault(name.split(" ")[0], ["start"]).append(name)
    for kind, names in kinds.items():
        rows = sorted((found[name] for name in names), key=lambda row: row["kl"])
        kl, known, half = ([row[what] for row in rows] for what in ("kl", "known", "known_half"))
        line = 0 if any("seed" in name for name in names) else 1  # runs that differ in a number, and not by chance
        axes.errorbar(kl, known, half, marker="o", markersize=4, capsize=2, elinewidth=1, linewidth=line, label=kind)
    axes.set(xlabel="KL from the start, nats a completion (best of n: at most)", ylabel="known reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
