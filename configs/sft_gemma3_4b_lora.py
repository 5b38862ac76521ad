"""LoRA on the text half of Gemma-3-4B-IT: a vocabulary of 262k, sliding windows, and norms that are trained beside the adapter.

Command: ftjax train --config=configs/sft_gemma3_4b_lora.py --workdir=runs/sft_gemma3_4b_lora
The model is gated: `hf auth login` first.
Hardware: one 24 GB GPU; 8 GB of it is the bfloat16 base. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.model.update({"name": "google/gemma-3-4b-it", "preset": "gemma-3-4b", "remat": "full"})
    config.methods = ("full", "lora")
    config.full.targets = "norms"
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.sources.dolly = base.source("databricks/databricks-dolly-15k", split="train[:95%]")
    config.data.eval_sources.dolly = base.source("databricks/databricks-dolly-15k", split="train[95%:]")
    config.data.update({"max_tokens": 2048, "batch_size": 16})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 30})
    # Norm scales are few and touch everything: a tenth of the adapter's learning rate.
    config.optimizer.groups = ((r"full/.*", 0.1),)
    config.eval.samples = 2
    return base.finish(config, arg, tiny="tiny-gemma3")
