"""Write what TRL's BCO trainer says of random log-probabilities; it was removed in 1.14.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, trl==1.13.0, datasets, scikit-learn, joblib, numpy.
Usage: python third_party/trl/golden_removed.py tests/goldens/trl.npz tests/goldens/trl_removed.npz

The problem is that of `golden.py`, the first response of each row; two steps, of which the second has the first's rewards in its δ.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments

PROBABILITIES = [0.9, 0.2]  # that the two undesirable prompts are desirable ones


def main() -> None:
    given = np.load(sys.argv[1])
    reference, desirable = torch.tensor(given["reference_logps"][:, 0].sum(-1)), torch.tensor(given["desirable"]) > 0
    found = {"probabilities": np.array(PROBABILITIES)}
    for name, weighed in (("bco", False), ("bco/weighed", True)):
        self = SimpleNamespace(
            beta=0.3,
            running=RunningMoments(SimpleNamespace(use_distributed=False)),
            match_underlying_distribution=weighed,
            args=SimpleNamespace(min_density_ratio=0.5, max_density_ratio=10.0),
            _get_chosen_prob=lambda embeddings: embeddings,
        )
        self._get_udm_weight = lambda embeddings, self=self: BCOTrainer._get_udm_weight(self, embeddings)
        for step, scale in enumerate((1.0, 0.5)):
            logps = torch.tensor(scale * given["logps"][:, 0], requires_grad=True)
            sums = logps.sum(-1)
            sides = [x[side] for x in (sums, reference) for side in (desirable, ~desirable)]
            losses, *_, delta = BCOTrainer.bco_loss(self, *sides, None, torch.tensor(PROBABILITIES))
            losses.mean().backward()
            found |= {f"{name}/{step}": losses.mean().detach(), f"{name}/{step}/gradient": logps.grad, f"{name}/{step}/delta": delta}
    np.savez_compressed(sys.argv[2], **found)


if __name__ == "__main__":
    main()
