"""QLoRA on Llama-3-8B-Instruct with an instruction set: the base in 4.127 bits a number, on one GPU.

Command: ftjax train --config=configs/qlora_llama3_8b.py --workdir=runs/qlora_llama3_8b
The model is gated: `hf auth login` first. Its matrices are packed as they are read, so the host needs no more memory than the device.
Hardware: one 24 GB GPU, UNTESTED. From shapes (`ftjax plan --config=… --topology=gpu:24GB`) 7.78 GB at most: 5.70 of base, 0.50 of LoRA and
its moments, 1.58 of activations, logits and gradients; the step was traced, and not compiled for a GPU.
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.methods = ("nf4", "lora")
    config.model.update({"name": "meta-llama/Meta-Llama-3-8B-Instruct", "preset": "llama-3-8b", "remat": "full"})
    config.data.sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[:98%]")
    config.data.eval_sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[98%:]")
    config.data.update({"max_tokens": 2048, "batch_size": 16, "accumulation": 16})
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 30})
    config.eval.samples = 2
    return base.finish(config, arg, tiny="tiny-llama")
