"""Does GRPO teach SmolLM2-135M-Instruct to add and subtract, from nothing but whether the answer is right?

Command: ftjax train --config=configs/grpo_smollm2_sums.py --workdir=runs/grpo_smollm2_sums
Data: python experiments/method_table/data.py data/sums
Hardware: 2 CPU cores beside other work, bfloat16, 25:15 min, 2.41 GB; 40 steps on one core, 4:58 min, 2.83 GB.
Result: 41.4 % → 53.9 % of 256 held-out sums right; with 40 steps 40.6 % → 51.3 ± 6.2 % (three seeds, 95 %), with rank 1 52.9 ± 3.7 %, over
NF4 30.5 % → 42.3 ± 5.3 %, with full tuning 49.6 ± 1.9 % (experiments/grpo_sums).
"""

from configs import base


def get_config(arg=""):
    config = base.online("grpo", kl_coef=0.0)
    config.steps = 100
    config.data.sources.sums = base.source("data/sums/train.jsonl")
    config.data.eval_sources.sums = base.source("data/sums/test.jsonl")
    config.data.update({"max_tokens": 64, "batch_size": 64, "accumulation": 2, "template": "none"})  # answers as short as the sum
    config.rewards.numeric_match = 1.0
    config.rollout.max_tokens = 8
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 5})
    config.eval.update({"every_steps": 25, "batches": 1})
    config.eval.generate.update({"examples": 256, "max_tokens": 8, "batch_size": 64, "metric": "numeric_match"})
    config.checkpoint.every_steps = 25
    config.logging.every_steps = 5
    return base.finish(config, arg, tiny="tiny-llama")
