"""How often does a reward model of 135M parameters agree with human preferences for harmlessness?

Command: ftjax train --config=configs/reward_smollm2_hh.py --workdir=runs/reward_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: UNTESTED at full length.
"""

from configs import base


def get_config(arg=""):
    config = base.judged("reward", centering_coef=0.01)
    config.methods = ("lora", "value_head")
    config.steps = 80
    config.data.sources.hh = base.source("Anthropic/hh-rlhf")
    config.data.eval_sources.hh = base.source("Anthropic/hh-rlhf", split="test[:256]")
    config.data.update({"max_tokens": 256, "batch_size": 4, "bad_rows": "skip"})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 10})
    config.eval.update({"every_steps": 40, "batches": 0})
    return base.finish(config, arg, tiny="tiny-llama")
