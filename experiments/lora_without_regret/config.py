"""LoRA beside full tuning at several learning rates and ranks. See README.md beside this file.

The argument is `full`, or `lora_all`, `lora_attention`, `lora_mlp`.
"""

from configs import base

TARGETS = {"all": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
RATES = {"full": (1e-5, 3e-5, 1e-4, 3e-4), "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
NEAR = {"full": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3)}
RANKS = (1, 8, 64)
SEEDS = (0, 1, 2)


def get_config(arg: str = "lora_all"):
    kind, _, part = arg.partition("_")
    config = base.sft()
    config.steps = 16
    config.methods = (kind,)
    config.lora.update({"targets": TARGETS[part or "all"], "alpha": 32.0, "rank": 8})
    config.data.sources.train = base.source("data/sums/train.jsonl")
    config.data.eval_sources.test = base.source("data/sums/test.jsonl")
    config.data.update({"max_tokens": 512, "batch_size": 2, "template": "none"})
    config.optimizer.update({"learning_rate": 1e-3 if kind == "lora" else 1e-4, "schedule": "constant", "warmup_steps": 2})
    config.eval.update({"every_steps": config.steps, "batches": 0})
    config.checkpoint.update({"every_steps": 0, "keep": 1})
    config.logging.update({"every_steps": 4, "tensorboard": False})
    return config.lock()
