"""LoRA on Qwen3-4B with a chat set; empty thinking blocks are trained as the template writes them.

Command: ftjax train --config=configs/sft_qwen3_4b_lora.py --workdir=runs/sft_qwen3_4b_lora
Hardware: one 24 GB GPU; 8 GB of it is the bfloat16 base. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.model.update({"name": "Qwen/Qwen3-4B", "preset": "qwen3-4b", "remat": "full"})
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.sources.chat = base.source("HuggingFaceH4/ultrachat_200k", split="train_sft")
    config.data.eval_sources.chat = base.source("HuggingFaceH4/ultrachat_200k", split="test_sft[:1000]")
    # The template strips the thinking of earlier turns, so what it shows of them is not what the model writes.
    config.data.update({"max_tokens": 2048, "batch_size": 16, "train_on": "last"})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 30})
    config.eval.samples = 2
    return base.finish(config, arg, tiny="tiny-qwen3")
