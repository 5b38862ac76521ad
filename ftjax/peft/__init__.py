"""Fine-tuning methods: one file each, a function from one parameter tree to `(frozen, trainable)` and back.

A method is a `Transform` (see `ftjax.types`). `METHODS` lists them once: for configs, for the contract tests and for the README.
"""

from ftjax.peft.chain import chain
from ftjax.peft.full import full
from ftjax.peft.lora import lora
from ftjax.peft.merge import merge
from ftjax.peft.neftune import neftune

METHODS = {"full": full, "lora": lora, "neftune": neftune}

__all__ = ["METHODS", "chain", "full", "lora", "merge", "neftune"]
