"""Do ten minutes of LoRA on a laptop teach a small model tasks that it cannot do: sorting, dates, JSON records, letters, units, sums?

Command: ftjax train --config=configs/quickstart.py --workdir=runs/quickstart
Hardware: 2 CPU cores. UNTESTED
"""

from configs import base


def experiment():
    """The tasks and their sizes, which sft_smollm2_full shares."""
    config = base.sft()
    config.steps = 120
    config.data.sources.tasks = base.source("tasks:mix")
    config.data.eval_sources.tasks = base.source("tasks:mix", split="test")
    config.data.update({"max_tokens": 192, "batch_size": 4})  # two or three problems a row
    config.optimizer.learning_rate = 1e-3
    config.eval.update({"every_steps": 40, "batches": 8})
    config.eval.generate.update({"examples": 100, "max_tokens": 40})
    config.checkpoint.every_steps = 40
    return config


def get_config(arg=""):
    return base.finish(experiment(), arg, tiny="tiny-llama")
