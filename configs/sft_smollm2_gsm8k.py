"""Does LoRA on GSM8K's worked solutions teach SmolLM2-135M-Instruct grade-school arithmetic?

Command: ftjax train --config=configs/sft_smollm2_gsm8k.py --workdir=runs/sft_smollm2_gsm8k
Local files: --config.data.sources.gsm8k.path=train.jsonl --config.data.eval_sources.gsm8k.path=test.jsonl
Hardware: 2 CPU cores. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.steps = 400
    config.data.sources.gsm8k = base.source("openai/gsm8k", name="main")
    config.data.eval_sources.gsm8k = base.source("openai/gsm8k", name="main", split="test")
    config.data.update({"max_tokens": 512, "batch_size": 4})
    config.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 20})
    config.eval.generate.update({"examples": 200, "max_tokens": 256, "metric": "numeric_match"})
    return base.finish(config, arg, tiny="tiny-llama")
