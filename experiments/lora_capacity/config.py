"""Random facts learnt by LoRA of several ranks and by full tuning, over a model that was trained on others. See README.md beside this file.

The argument is `base`, which trains all of a random model; or `lora` or `full`, how many facts, and which draw of them: `lora-256-0`.
"""

from configs import base

SIZES = (64, 256, 512, 1024)
DIGITS = 4
DRAWS = 3
RANKS = (1, 2, 4, 8, 16)
RATES = (1e-3, 3e-3, 1e-2)


def get_config(arg: str = "lora-256-0"):
    kind, *facts = arg.split("-")
    size, draw = (int(number) for number in facts or (512, 0))
    config = base.sft()
    config.seed = draw
    config.steps = 500 + 3 * size // 2
    config.methods = ("lora" if kind == "lora" else "full",)
    config.model.update({"preset": "tiny-llama", "random": kind == "base", "dtype": "float32", "remat": "none"})
    config.tokenizer = "bytes" if kind == "base" else ""
    path = f"data/facts/{'-'.join(facts) or 'base'}.jsonl"
    config.data.sources.train, config.data.eval_sources.test = base.source(path), base.source(path)  # what is asked is what was told
    config.data.update({"max_tokens": 64, "batch_size": 8, "template": "none"})  # 8 facts a row, which do not see each other
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 20})
    config.eval.update({"every_steps": config.steps // 4, "batches": 0})
    config.checkpoint.update({"every_steps": 0, "keep": 1})
    config.logging.update({"every_steps": 100, "tensorboard": False})
    return config.lock()
