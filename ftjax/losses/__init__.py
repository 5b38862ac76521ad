"""Objectives: one file each, pure functions `(Scores, Batch) -> (Mean, {name: Mean})` that never see a model.

`LOSSES` lists them once: for configs, for the contract tests and for the README.
"""

from ftjax.losses.sft import sft

LOSSES = {"sft": sft}

__all__ = ["LOSSES", "sft"]
