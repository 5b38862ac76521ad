"""Write what TRL's own trainers say of random rollouts: loss and gradient of every policy objective that it has, and its advantages.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, trl==1.16.0 or 1.13.0, datasets, numpy.
Usage: python third_party/trl/golden_policy.py tests/goldens/trl.npz tests/goldens/trl_policy.npz          with TRL 1.16.0
       python third_party/trl/golden_policy.py tests/goldens/trl.npz tests/goldens/trl_policy_removed.npz  with 1.13.0: what 1.14 removed

As in `golden.py` the methods that hold the formulas are called with a stand-in for `self` and given log-probabilities `[b, t]`, in float64;
`NAME/gradient` is the derivative in them. What TRL takes over a micro-batch is asked of one response at a time where we take it over each.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd

B, T = 4, 7
VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
PAIRS = ("logps", "reference_logps", "desirable")


def problem() -> dict[str, np.ndarray]:
    """Return rollouts of 1 to 6 tokens after a prompt of one: ratios between 0.3 and 3, both signs of the advantage."""
    rng = np.random.default_rng(2)
    mask = np.zeros((B, T))
    for row, length in enumerate([6, 3, 1, 5]):
        mask[row, 1 : 1 + length] = 1
    logps = -rng.gamma(1.5, size=mask.shape) * mask
    other = lambda size: (logps - size * rng.normal(size=mask.shape)) * mask  # noqa: E731
    return {
        "logps": logps,
        "old_logps": other(0.4),
        "behavior_logps": other(0.9),
        "reference_logps": other(0.7),
        "entropy": rng.gamma(1.5, size=mask.shape).astype(np.float32) * mask,  # what the quantile is taken of in TRL
        "advantages": np.array([1.2, -0.7, -1.5, 0.6]),
        "loss_mask": mask,
    }


class Metrics(dict):
    """Takes whatever is logged."""

    def __missing__(self, key):
        return self.setdefault(key, [])


def trainer(logps: torch.Tensor, data: dict[str, torch.Tensor], args: dict, **fields) -> SimpleNamespace:
    same = lambda x, **_: x  # noqa: E731
    self = SimpleNamespace(
        accelerator=SimpleNamespace(
            device="cpu", gather=same, gather_for_metrics=same, reduce=same, pad_across_processes=same, num_processes=1, sync_gradients=True
        ),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=True, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1
        ),
        _metrics={"train": Metrics()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, data["entropy"], None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
        use_vllm=False,
        vllm_importance_sampling_correction=True,
        max_completion_length=T - 1,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        use_liger_kernel=False,
    )
    vars(self).update(fields)
    vars(self.args).update(args)
    self.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(self, *given)
    self.get_gamma_weights = getattr(GRPOTrainer, "get_gamma_weights", None)
    self.get_off_policy_mask = getattr(GRPOTrainer, "get_off_policy_mask", None)
    return self


def inputs(data: dict[str, torch.Tensor], first: bool) -> dict[str, torch.Tensor]:
    mask = data["loss_mask"].long()
    prompt = torch.zeros(len(mask), 1).long()
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": None if first else data["old_logps"],
        "ref_per_token_logps": data["reference_logps"],
        "sampling_per_token_logps": data["behavior_logps"],
        "num_items_in_batch": mask.sum(),
    }


def grpo(logps, data, first=False, args=None, kind=GRPOTrainer, correction=None, cap=3.0, **fields):
    self, given = trainer(logps, data, args or {}, **fields), inputs(data, first)
    if correction:  # the few lines that trainer has among its sampling
        self.use_vllm, difference = True, (data["old_logps"] - data["behavior_logps"]) * data["loss_mask"]
        ratio = torch.exp(difference.sum(-1, keepdim=True) if "sequence" in correction else difference)
        given["importance_sampling_ratio"] = ratio.clamp(max=cap) if "truncate" in correction else ratio.masked_fill(ratio > cap, 0)
    return kind._compute_loss(self, None, given)


def rloo(logps, data):
    self, given = trainer(logps, data, {}), inputs(data, False)
    given["old_logps"] = (data["old_logps"] * data["loss_mask"]).sum(1)
    return RLOOTrainer._compute_loss(self, None, given)


def gradient_of(function, data, rows=slice(None), **options) -> tuple[np.ndarray, np.ndarray]:
    given = {name: torch.tensor(value[rows]) for name, value in data.items()}
    at = given["logps"].requires_grad_()
    loss = function(at, given, **options)
    return loss.detach().numpy(), torch.autograd.grad(loss, at)[0].numpy()


def advantages() -> dict[str, np.ndarray]:
    """Return a group's advantages as the lines of the two trainers compute them; a reward that is NaN is none."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25], [1.0, float("nan"), 3.0, 2.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    centred = rewards - rewards.nanmean(1, keepdim=True)
    others = (rewards.nansum(1, keepdim=True) - rewards) / ((~rewards.isnan()).sum(1, keepdim=True) - 1)
    return {
        "rewards": rewards.numpy(),
        "group": (centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)).nan_to_num().numpy(),
        "batch": (centred / (nanstd(rewards) + 1e-4)).nan_to_num().numpy(),
        "none": centred.nan_to_num().numpy(),
        "leave_one_out": (rewards - others).nan_to_num().numpy(),
        "decoupled": decoupled(torch.stack([rewards, rewards.flip(1) ** 2]), torch.tensor([1.0, 0.5], dtype=torch.float64)),
    }


def decoupled(rewards, weights) -> np.ndarray:
    """As the lines of `normalize_then_sum`; the unscorable responses have the advantage 0."""
    each = (rewards - rewards.nanmean(2, keepdim=True)) / (nanstd(rewards, dim=2)[..., None] + 1e-4)
    total = (each * weights[:, None, None]).nansum(0)
    total[rewards.isnan().all(0)] = float("nan")
    return ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num().numpy()


def current(add, add_by_row) -> None:
    from trl.experimental.gmpo import GMPOTrainer

    for kind in "grpo bnpo dr_grpo sapo luspo".split():
        add(f"grpo/{kind}", grpo, loss_type=kind, importance_sampling_level="sequence" if kind == "luspo" else "token")
    add("grpo/dapo", grpo, loss_type="dapo", epsilon_high=0.28)
    add("grpo/cispo", grpo, loss_type="cispo", epsilon_high=1.5)
    add("grpo/gspo", grpo, importance_sampling_level="sequence")
    add("grpo/first", grpo, first=True)
    add("grpo/two_sided", grpo, args={"delta": 1.5})
    add("grpo/kl", grpo, beta=0.3)
    add("grpo/kl_unweighted", grpo, beta=0.3, args={"use_bias_correction_kl": False})
    add_by_row("grpo/entropy_bonus", grpo, _entropy_bonus_enabled=True, entropy_coef=0.2)
    add_by_row("grpo/top_entropy", grpo, top_entropy_quantile=0.35)
    for correction in ("token_truncate", "token_mask", "sequence_truncate"):
        add(f"grpo/{correction}", grpo, correction=correction)
    add("grpo/sequence_mask", grpo, correction="sequence_mask", cap=9.0)
    add("grpo/vespo", grpo, loss_type="vespo", args={f"vespo_{x}": n for x, n in VESPO.items()})
    add("grpo/off_policy", grpo, off_policy_mask_threshold=0.1)
    add("gmpo", grpo, kind=GMPOTrainer, epsilon_low=0.4, epsilon_high=0.4)
    add("rloo", rloo)


def nash_md(logps, data):
    from trl.experimental.nash_md import NashMDTrainer

    return NashMDTrainer._compute_losses(SimpleNamespace(beta=0.3), logps, data["reference_logps"], data["advantages"] + 0.5)[0]


def xpo(logps, data):
    """Of pairs `[b, 2, t]` from `golden.py`, the policy's response first."""
    from trl.experimental.xpo import XPOTrainer

    self = SimpleNamespace(beta=0.3, alpha=0.1, args=SimpleNamespace(loss_type="sigmoid"))
    own, other = logps.unbind(1)
    own_reference, other_reference = data["reference_logps"].unbind(1)
    return XPOTrainer._compute_losses(self, own, other, other_reference, own_reference, data["desirable"] > 0)[0]


def removed(add) -> None:
    from trl.experimental.gspo_token import GRPOTrainer as GSPOTokenTrainer

    add("nash_md", nash_md)
    add("gspo_token", grpo, kind=GSPOTokenTrainer, importance_sampling_level="sequence_token")


def main() -> None:
    data, found = problem(), {}
    pairs = {name: x[:, :2] if x.ndim == 3 else x for name, x in np.load(sys.argv[1]).items() if name in PAIRS}

    def add(name, function, **options):
        found[name], found[f"{name}/gradient"] = gradient_of(function, data, **options)

    def add_by_row(name, function, **options):
        parts = [gradient_of(function, data, rows=slice(n, n + 1), **options) for n in range(B)]
        found[name], found[f"{name}/gradient"] = np.mean([p[0] for p in parts]), np.concatenate([p[1] for p in parts]) / B

    if trl.__version__.startswith("1.13."):
        removed(add)
        found["xpo"], found["xpo/gradient"] = gradient_of(xpo, pairs)
    else:
        current(add, add_by_row)
        found |= {f"problem/{name}": value for name, value in data.items()}
        found |= {f"advantages/{name}": value for name, value in advantages().items()}
    np.savez_compressed(sys.argv[2], **found)


if __name__ == "__main__":
    main()
