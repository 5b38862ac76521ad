"""Does LoRA on GSM8K's worked solutions teach SmolLM2-135M-Instruct grade-school arithmetic?

Command: ftjax train --config=configs/sft_smollm2_gsm8k.py --workdir=runs/sft_smollm2_gsm8k
Local files: --config.data.sources.gsm8k.path=train.jsonl --config.data.eval_sources.gsm8k.path=test.jsonl
Hardware: 2 CPU cores, 143 minutes beside other work, 2.74 GB (Python 3.12, JAX 0.12.0.1, bfloat16).
Result: the last number is right for 1.5 % -> 4.5 % of 200 held-out problems; seed 0, 2026-11-24; see experiments/sft_gsm8k.
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
