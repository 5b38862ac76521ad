"""The reward of the best of k completions, for every k up to the n that `ftjax generate --best_of=n` drew, and its KL from the policy.

    python -m experiments.best_of_n.report ANSWERS.jsonl

The expected reward of the best of k of n draws without replacement is Σ_i C(i-1, k-1) / C(n, k) · r_(i), with r_(1) ≤ … ≤ r_(n): unbiased,
and every k from the same draws. The KL of best-of-k from the policy is at most log k - (k - 1) / k (Beirami et al., 2024, arXiv
2401.01879). Rewards are those of the model that chose: that they rise says how much there is to choose from, not that people agree.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def expected_best(rewards: Sequence[float], k: int) -> float:
    """Return the mean over all subsets of k rewards of the largest in each.

    >>> expected_best([1.0, 2.0, 4.0], 2)
    3.3333333333333335
    """
    n = len(rewards)
    return sum(math.comb(i, k - 1) * reward for i, reward in enumerate(sorted(rewards))) / math.comb(n, k)


def kl_bound(k: int) -> float:
    """Return the most nats that best-of-k is from the policy."""
    return math.log(k) - (k - 1) / k


def main(path: str) -> None:
    """Print the table."""
    rows = [json.loads(line)["rewards"] for line in Path(path).read_text().splitlines()]
    n = min(map(len, rows))
    print("| k | mean reward of the best | ± standard error over prompts | KL at most |\n|---|---|---|---|")
    for k in sorted({1, 2, 4, 8, 16, 32, 64, n}):
        if k <= n:
            values = np.array([expected_best(rewards[:n], k) for rewards in rows])
            print(f"| {k} | {values.mean():.3f} | {values.std(ddof=1) / math.sqrt(len(values)):.3f} | {kl_bound(k):.2f} |")


if __name__ == "__main__":
    main(sys.argv[1])
