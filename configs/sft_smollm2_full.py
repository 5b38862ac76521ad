"""What does it cost to train every weight of SmolLM2-135M-Instruct instead of an adapter, on the quick start's task?

Command: ftjax train --config=configs/sft_smollm2_full.py --workdir=runs/sft_smollm2_full
Then: ftjax export --workdir=runs/sft_smollm2_full --output=runs/sft_smollm2_full/model
Hardware: 2 CPU cores, about 4 GB (weights, gradients and two moments in float32). UNTESTED
"""

from configs import base, quickstart


def get_config(arg=""):
    config = quickstart.experiment()
    config.methods = ("full",)
    config.optimizer.learning_rate = 3e-5
    config.optimizer.weight_decay = 0.01
    return base.finish(config, arg, tiny="tiny-llama")
