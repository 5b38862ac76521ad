"""Fine-tuning methods: one file each, a function from one parameter tree to `(frozen, trainable)` and back.

A method is a `Transform` (see `ftjax.types`). `METHODS` lists them once: for configs, for the contract tests and for the README.
`FORMATS` lists how those that PEFT has stand in its folders (see `ftjax.peft.format`), `SOFT_PROMPTS` those that put tokens before a row;
`ftjax.hf.peft` reads and writes by them.
"""

from ftjax.peft.adalora import ADALORA, adalora
from ftjax.peft.anchored import REFERENCE, anchored, reference
from ftjax.peft.bitfit import bitfit, norm_tuning
from ftjax.peft.boft import BOFT, boft
from ftjax.peft.bottleneck import bottleneck, parallel_bottleneck
from ftjax.peft.chain import chain
from ftjax.peft.combine import combine
from ftjax.peft.delta_lora import DELTA_LORA, delta_lora
from ftjax.peft.dora import DORA, dora
from ftjax.peft.format import Format, Tensor
from ftjax.peft.full import full
from ftjax.peft.hira import HIRA, hira
from ftjax.peft.ia3 import IA3, ia3
from ftjax.peft.layers import on_layers
from ftjax.peft.loftq import LOFTQ, loftq
from ftjax.peft.loha import LOHA, loha
from ftjax.peft.lokr import LOKR, lokr
from ftjax.peft.lora import LORA, lora
from ftjax.peft.lora_fa import LORA_FA, lora_fa
from ftjax.peft.merge import merge
from ftjax.peft.miss import MISS, miss
from ftjax.peft.mixed import assign_rows, mixed, row_indices, stack_adapters
from ftjax.peft.neftune import neftune
from ftjax.peft.oft import OFT, oft
from ftjax.peft.p_tuning import P_TUNING, p_tuning
from ftjax.peft.plain import plain
from ftjax.peft.prefix_tuning import PREFIX_TUNING, prefix_tuning
from ftjax.peft.prompt_tuning import PROMPT_TUNING, prompt_tuning
from ftjax.peft.randlora import RANDLORA, randlora
from ftjax.peft.relora import RELORA, relora
from ftjax.peft.shira import SHIRA, shira
from ftjax.peft.soft_prompt import SoftPrompt
from ftjax.peft.tokens import tokens
from ftjax.peft.value_head import value_head
from ftjax.peft.vera import VERA, vera

METHODS = {"dora": dora, "full": full, "ia3": ia3, "lora": lora, "lora_fa": lora_fa, "neftune": neftune, "vera": vera} | {
    "adalora": adalora,
    "bitfit": bitfit,
    "boft": boft,
    "bottleneck": bottleneck,
    "delta_lora": delta_lora,
    "hira": hira,
    "loftq": loftq,
    "loha": loha,
    "lokr": lokr,
    "miss": miss,
    "norm_tuning": norm_tuning,
    "oft": oft,
    "parallel_bottleneck": parallel_bottleneck,
    "p_tuning": p_tuning,
    "prefix_tuning": prefix_tuning,
    "prompt_tuning": prompt_tuning,
    "randlora": randlora,
    "relora": relora,
    "shira": shira,
    "tokens": tokens,
    "value_head": value_head,
}

FORMATS: dict[str, Format] = {"lora": LORA, "dora": DORA, "lora_fa": LORA_FA, "ia3": IA3, "vera": VERA} | {
    "adalora": ADALORA,
    "boft": BOFT,
    "delta_lora": DELTA_LORA,
    "hira": HIRA,
    "loftq": LOFTQ,
    "loha": LOHA,
    "lokr": LOKR,
    "miss": MISS,
    "oft": OFT,
    "randlora": RANDLORA,
    "relora": RELORA,
    "shira": SHIRA,
}

SOFT_PROMPTS: dict[str, SoftPrompt] = {"p_tuning": P_TUNING, "prefix_tuning": PREFIX_TUNING, "prompt_tuning": PROMPT_TUNING}
"""The methods that put virtual tokens before every row: they have no neutral start and cannot be merged."""

__all__ = [
    "FORMATS",
    "METHODS",
    "REFERENCE",
    "SOFT_PROMPTS",
    "Format",
    "SoftPrompt",
    "Tensor",
    "adalora",
    "anchored",
    "assign_rows",
    "bitfit",
    "boft",
    "bottleneck",
    "chain",
    "combine",
    "delta_lora",
    "dora",
    "full",
    "hira",
    "ia3",
    "loftq",
    "loha",
    "lokr",
    "lora",
    "lora_fa",
    "merge",
    "miss",
    "mixed",
    "neftune",
    "norm_tuning",
    "oft",
    "on_layers",
    "parallel_bottleneck",
    "p_tuning",
    "plain",
    "prefix_tuning",
    "prompt_tuning",
    "randlora",
    "reference",
    "relora",
    "row_indices",
    "shira",
    "stack_adapters",
    "tokens",
    "value_head",
    "vera",
]
