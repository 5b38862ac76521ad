"""LoRA on Llama-3-8B-Instruct with an instruction set: the recipe to copy for a checkpoint of the hub.

Command: ftjax train --config=configs/sft_llama3_8b_lora.py --workdir=runs/sft_llama3_8b_lora
The model is gated: `hf auth login` first. On more devices the base is split over all of them (mesh.fsdp = -1); on a pod run the same
command on every worker.
Hardware: one 40 GB GPU or a v5e-8; 16 GB of it is the bfloat16 base. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.model.update({"name": "meta-llama/Meta-Llama-3-8B-Instruct", "preset": "llama-3-8b", "remat": "full"})
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[:98%]")
    config.data.eval_sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[98%:]")
    config.data.update({"max_tokens": 2048, "batch_size": 16})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 30})
    config.eval.samples = 2
    return base.finish(config, arg, tiny="tiny-llama")
