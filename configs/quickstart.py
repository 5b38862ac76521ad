"""Does a quarter of an hour of LoRA on a laptop teach a small model a task that it cannot do?

Command: ftjax train --config=configs/quickstart.py --workdir=runs/quickstart
Hardware: 2 CPU cores. UNTESTED
"""

from configs import base


def experiment():
    """The task and its sizes, which sft_smollm2_full shares."""
    config = base.sft()
    config.steps = 100
    config.data.sources.task = base.source("tasks:sort")
    config.data.eval_sources.task = base.source("tasks:sort", split="test")
    config.eval.generate.update({"examples": 64, "max_tokens": 24})
    return config


def get_config(arg=""):
    return base.finish(experiment(), arg, tiny="tiny-llama")
