"""Does LongLoRA bring SmolLM2-135M from 8,192 to 32,768 tokens: LoRA on attention, with trained norms and embeddings, on long books?

Positions are interpolated (linear RoPE × 4); training attends in shifted groups of a quarter of the row (S²), evaluation to everything.
LoRA's settings are those of arXiv:2309.12307, whose batches of 64 rows took 8 GPUs. SmolLM2's output head is its embedding, so it is
trained with it.
Command: ftjax train --config=configs/pretrain_smollm2_longlora.py --workdir=runs/pretrain_smollm2_longlora
Then: ftjax export --workdir=runs/pretrain_smollm2_longlora --output=runs/pretrain_smollm2_longlora/model
Hardware: one 80 GB GPU. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.model.name = "HuggingFaceTB/SmolLM2-135M"
    config.model.remat = "full"
    config.model.rope.update({"rope_type": "linear", "factor": 4.0})
    config.model.group_tokens = 8192
    config.methods = ("lora", "full")
    config.lora.update({"targets": "attention", "rank": 8, "alpha": 16.0})
    config.full.targets = r"(.*/)?[a-z_]*norm/scale|embed_tokens/kernel"
    config.data.sources.books = base.source("emozilla/pg19", format="text")
    config.data.eval_sources.books = base.source("emozilla/pg19", format="text", split="validation")
    config.data.update({"max_tokens": 32768, "batch_size": 8, "accumulation": 2, "packing": "wrapped", "train_on": "all"})
    config.optimizer.update({"learning_rate": 2e-5, "schedule": "constant", "warmup_steps": 20, "b2": 0.95})
    config.eval.update({"batches": 1})
    return base.finish(config, arg, tiny="tiny-llama")
