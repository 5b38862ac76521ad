"""One method at its size and learning rate; `METHODS` has them all. See README.md beside this file."""

from configs import base

METHODS = {
    "full": ({}, (3e-5, 1e-4, 3e-4)),
    "lora": ({"rank": 8, "alpha": 16.0}, (3e-4, 1e-3, 3e-3)),
    "nf4+lora": ({"rank": 8, "alpha": 16.0}, (3e-4, 1e-3, 3e-3)),
    "loftq": ({"rank": 8, "alpha": 16.0}, (1e-3, 3e-3)),
    "dora": ({"rank": 8, "alpha": 16.0}, (1e-3, 3e-3)),
    "lora_fa": ({"rank": 16, "alpha": 32.0}, (1e-3, 3e-3)),
    "adalora": ({"init_rank": 12, "target_rank": 8, "alpha": 16.0}, (1e-2, 3e-2, 1e-1)),
    "delta_lora": ({"rank": 8, "alpha": 16.0}, (1e-3, 3e-3)),
    "relora": ({"rank": 8, "alpha": 16.0, "every_steps": 12, "warmup_steps": 2}, (1e-3, 3e-3)),
    "vera": ({"rank": 256}, (1e-2, 3e-2, 1e-1)),
    "ia3": ({}, (3e-3, 1e-2, 3e-2)),
    "hira": ({"rank": 8}, (1e-3, 3e-3, 1e-2)),
    "loha": ({"rank": 4, "alpha": 8.0}, (1e-3, 3e-3, 1e-2)),
    "lokr": ({"rank": 8, "alpha": 16.0}, (1e-3, 3e-3, 1e-2)),
    "miss": ({"rank": 16}, (3e-4, 1e-3)),
    "shira": ({"rank": 8}, (3e-4, 1e-3, 3e-3)),
    "randlora": ({"rank": 32}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "oft": ({"block_size": 32}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "boft": ({"block_size": 4, "factors": 2}, (1e-3, 3e-3)),
    "norm_tuning": ({}, (3e-3, 1e-2)),
    "bottleneck": ({"width": 32}, (1e-3, 3e-3, 1e-2)),
    "parallel_bottleneck": ({"width": 64}, (1e-3, 3e-3)),
    "prompt_tuning": ({"num_tokens": 32}, (1e-2, 1e-1)),
    "p_tuning": ({"num_tokens": 32}, (1e-3, 3e-3, 1e-2)),
    "prefix_tuning": ({"num_tokens": 32}, (1e-2, 3e-2, 1e-1)),
    "lora@adamw8bit": ({"rank": 8, "alpha": 16.0}, (1e-3,)),
    "full@adamw8bit": ({}, (1e-4,)),
    "lora@lion": ({"rank": 8, "alpha": 16.0}, (1e-4, 3e-4)),
    "lora@lion8bit": ({"rank": 8, "alpha": 16.0}, (1e-4, 3e-4)),
}
"""`{method: (its options, the learning rates that are tried)}`; about the size of LoRA at rank 8 where the method has the choice.

Where a name ends in `@`, it is that of the optimiser: 8-bit AdamW at the rate that is the better one with AdamW, Lion at a tenth of it and
at a third.
"""


def get_config(arg: str = "lora"):
    config = base.sft()
    config.steps = 24
    methods, _, optimizer = arg.partition("@")
    config.methods = tuple(methods.split("+"))
    config[config.methods[-1]].update(METHODS[arg][0])
    config.data.sources.train = base.source("data/sums/train.jsonl")
    config.data.eval_sources.test = base.source("data/sums/test.jsonl")
    config.data.update({"max_tokens": 512, "batch_size": 1, "template": "none"})
    config.optimizer.update({"name": optimizer or "adamw", "learning_rate": METHODS[arg][1][0], "warmup_steps": 4})
    config.eval.update({"every_steps": 24, "batches": 0})
    config.eval.generate.update({"examples": 256, "max_tokens": 6, "batch_size": 64})
    config.checkpoint.update({"every_steps": 0, "keep": 1})
    config.logging.update({"every_steps": 4, "tensorboard": False})
    return config.lock()
