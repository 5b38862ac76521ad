"""QLoRA on Llama-3.1-70B-Instruct with an instruction set: the base in 4.127 bits a number, on one GPU or a slice of TPUs.

Command: ftjax train --config=configs/qlora_llama3_70b.py --workdir=runs/qlora_llama3_70b
TPU slice: --config.mesh.data=1 --config.mesh.fsdp=-1 --config.data.accumulation=1, the same command on every worker.
The model is gated: `hf auth login` first. Its matrices are packed as they are read: the host holds 40 GB, not 141.
Hardware: one 48 GB GPU, or a v5e-16; UNTESTED. With the flags above `ftjax plan --config=… --topology=v5e:4x4` compiles the step by
libtpu: 7.83 GB of each chip's 16.91. For `--topology=gpu:48GB` (51.54 GB) it is 46.02 GB from shapes, 39.52 of them the base, and not
compiled; there JAX needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.methods = ("nf4", "lora")
    config.model.update({"name": "meta-llama/Llama-3.1-70B-Instruct", "preset": "llama-3.1-70b", "remat": "full"})
    config.data.sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[:98%]")
    config.data.eval_sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[98%:]")
    config.data.update({"max_tokens": 1024, "batch_size": 16, "accumulation": 16})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 30})
    config.eval.samples = 2
    return base.finish(config, arg, tiny="tiny-llama")
