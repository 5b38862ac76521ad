"""Objectives: one file each, pure functions `(Scores, Batch) -> (Mean, {name: Mean})` that never see a model.

`LOSSES` lists them once: for configs, for the contract tests and for the README.
"""

from functools import partial

from ftjax.losses import advantages, shaping
from ftjax.losses.bco import bco
from ftjax.losses.cpo import cpo, simpo
from ftjax.losses.distillation import distill
from ftjax.losses.kto import apo_zero_unpaired, balance, kl_baseline, kto, with_baseline
from ftjax.losses.needs import NEEDS, Needs
from ftjax.losses.online import nash_md, xpo
from ftjax.losses.orpo import orpo
from ftjax.losses.packing import unpacked
from ftjax.losses.pairs import PAIR_LOSSES
from ftjax.losses.policy_gradient import POLICY_LOSSES, policy_gradient
from ftjax.losses.ppo import ppo
from ftjax.losses.preference import dpo, mpo, preference, rpo, wpo
from ftjax.losses.reference import followed, with_reference
from ftjax.losses.reward import bradley_terry, response_rewards, stepwise
from ftjax.losses.sft import sft
from ftjax.losses.tpo import tpo, tpo_l
from ftjax.losses.unlearning import desirable_share, gradient_difference, npo, with_share

LOSSES = {
    "sft": sft,
    # pairs against a reference
    "dpo": dpo,
    "rpo": rpo,
    "mpo": mpo,
    "wpo": wpo,
    **{name: partial(preference, losses={name: 1.0}) for name in PAIR_LOSSES if name != "sigmoid"},
    # without a reference
    "orpo": orpo,
    "cpo": cpo,
    "simpo": simpo,
    "alphapo": partial(simpo, alpha=0.25),
    "tpo": tpo,
    "tpo_l": tpo_l,
    # single responses
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
    "bco_balanced": bco,  # with the paper's δ: see NEEDS
    # reward models
    "reward": bradley_terry,
    "process_reward": stepwise,
    # distillation
    "distill": distill,
    # rollouts
    **POLICY_LOSSES,
    "ppo": ppo,
    "nash_md": nash_md,
    "xpo": xpo,
    "rejection_sampling": sft,  # of the samples that rewards select: see ftjax.online.selection
    # unlearning
    "npo": npo,
    "gradient_difference": gradient_difference,
}

__all__ = [
    "LOSSES",
    "NEEDS",
    "PAIR_LOSSES",
    "POLICY_LOSSES",
    "Needs",
    "advantages",
    "apo_zero_unpaired",
    "balance",
    "bco",
    "bradley_terry",
    "cpo",
    "desirable_share",
    "distill",
    "dpo",
    "followed",
    "gradient_difference",
    "kl_baseline",
    "kto",
    "mpo",
    "nash_md",
    "npo",
    "orpo",
    "policy_gradient",
    "ppo",
    "preference",
    "response_rewards",
    "rpo",
    "sft",
    "shaping",
    "simpo",
    "stepwise",
    "tpo",
    "tpo_l",
    "unpacked",
    "with_baseline",
    "with_reference",
    "with_share",
    "wpo",
    "xpo",
]
