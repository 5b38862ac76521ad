"""Objectives: one file each, pure functions `(Scores, Batch) -> (Mean, {name: Mean})` that never see a model.

`LOSSES` lists them once: for configs, for the contract tests and for the README.
"""

from functools import partial

from ftjax.losses.pairs import PAIR_LOSSES
from ftjax.losses.preference import dpo, ipo, mpo, preference, rpo, wpo
from ftjax.losses.reference import with_reference
from ftjax.losses.sft import sft

LOSSES = {
    "sft": sft,
    "dpo": dpo,
    "rpo": rpo,
    "mpo": mpo,
    "wpo": wpo,
    **{name: partial(preference, losses={name: 1.0}) for name in PAIR_LOSSES if name != "sigmoid"},
}

__all__ = ["LOSSES", "PAIR_LOSSES", "dpo", "ipo", "mpo", "preference", "rpo", "sft", "with_reference", "wpo"]
