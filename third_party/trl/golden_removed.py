"""Write what TRL's BCO trainer says of random log-probabilities, and its PRM trainer of random logits; both were removed in 1.14.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, trl==1.13.0, datasets, scikit-learn, joblib, numpy.
Usage: python third_party/trl/golden_removed.py tests/goldens/trl.npz tests/goldens/trl_removed.npz

The problem is that of `golden.py`, the first response of each row; two steps of BCO, of which the second has the first's rewards in its δ.
The PRM trainer reads two logits of every token, the first two of that problem, and has no loss of its own: it is transformers' of token
classes, in float32, which its `compute_loss` asks the model for. Steps end at every other token of the response (`prm/labels`, else -100).
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from transformers.loss.loss_utils import ForTokenClassification
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
from trl.experimental.prm import PRMTrainer

PROBABILITIES = [0.9, 0.2]  # that the two undesirable prompts are desirable ones


def prm(given) -> dict[str, np.ndarray]:
    ends = (given["loss_mask"][:, 0] > 0) & (np.arange(given["loss_mask"].shape[-1]) % 2 == 1)
    labels = np.where(ends, np.random.default_rng(2).integers(0, 2, ends.shape), -100)
    logits = torch.tensor(given["logits"][..., :2], requires_grad=True)
    model = lambda labels, **_: {"loss": ForTokenClassification(logits, labels, SimpleNamespace(num_labels=2))}  # noqa: E731
    self = SimpleNamespace(
        label_smoother=None,
        compute_loss_func=None,
        model_accepts_loss_kwargs=False,
        args=SimpleNamespace(average_tokens_across_devices=False),
    )
    self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    loss = PRMTrainer.compute_loss(self, model, {"labels": torch.tensor(labels)})
    loss.backward()
    return {"prm": loss.detach().numpy(), "prm/gradient": logits.grad.numpy(), "prm/labels": labels}


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
    np.savez_compressed(sys.argv[2], **found, **prm(given))


if __name__ == "__main__":
    main()
