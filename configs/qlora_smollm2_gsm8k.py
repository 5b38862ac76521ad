"""Does GSM8K teach SmolLM2-135M-Instruct as much where its matrices lie in four bits? The QLoRA beside sft_smollm2_gsm8k.

Command: ftjax train --config=configs/qlora_smollm2_gsm8k.py --workdir=runs/qlora_smollm2_gsm8k
Local files: --config.data.sources.gsm8k.path=train.jsonl --config.data.eval_sources.gsm8k.path=test.jsonl
Another format: --config.methods=int8,lora, or fp4, int4, uint4, uint8.
Hardware: 2 CPU cores. UNTESTED at full length; cut to 100 steps of 512 tokens, three seeds, 2026-11-29 (experiments/qlora_gsm8k): held-out
loss 0.865 instead of LoRA's 0.814, in 0.41 of the base's memory.
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.methods = ("nf4", "lora")
    config.steps = 400
    config.data.sources.gsm8k = base.source("openai/gsm8k", name="main")
    config.data.eval_sources.gsm8k = base.source("openai/gsm8k", name="main", split="test")
    config.data.update({"max_tokens": 512, "batch_size": 4})
    config.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 20})
    config.eval.generate.update({"examples": 200, "max_tokens": 256, "metric": "numeric_match"})
    return base.finish(config, arg, tiny="tiny-llama")
