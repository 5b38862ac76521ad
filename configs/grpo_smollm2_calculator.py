"""Does GRPO teach SmolLM2-135M-Instruct to use a calculator, from nothing but whether the answer is right?

Command: ftjax train --config=configs/grpo_smollm2_calculator.py --workdir=runs/grpo_smollm2_calculator
Data: python experiments/calculator/data.py data/products
Hardware: 1 CPU core, bfloat16, 5.1 GB.
Time: 19 minutes beside other work.
Result: of 64 held-out products 27 are right before training and 63 after it; of 32 episodes 31 or 32 from step 11 on
(experiments/calculator).
"""

from configs import base

PROMPT = "You have a calculator."  # the prompts show how it is called


def get_config(arg=""):
    config = base.online("grpo", kl_coef=0.0)
    config.steps = 20
    config.data.sources.products = base.source("data/products/train.jsonl")
    config.data.eval_sources.products = base.source("data/products/test.jsonl")
    config.data.update({"max_tokens": 320, "batch_size": 32, "accumulation": 2})
    config.rewards.numeric_match = 1.0  # of the last answer
    config.rollout.max_tokens = 96  # calls, results and answer together
    config.rollout.environment.update({"tools": ("calculator",), "prompt": PROMPT, "max_turns": 3})
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 5})
    config.eval.update({"every_steps": 20, "batches": 2})
    config.checkpoint.every_steps = 20
    config.logging.every_steps = 2
    return base.finish(config, arg, tiny="tiny-llama")
