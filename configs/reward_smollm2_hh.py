"""How often does a reward model of 135M parameters agree with human preferences for harmlessness?

Command: ftjax train --config=configs/reward_smollm2_hh.py --workdir=runs/reward_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Then: ftjax export --workdir=runs/reward_smollm2_hh --output=DIR writes a classifier of one label; the adapter is one of PEFT's, SEQ_CLS.
Hardware: one core of an AMD EPYC. 8:41 minutes and 2.3 GB (JAX 0.12.0.1), beside another run.
Result: from the local file, with 59.4 % of 251 held-out pairs, by a margin of 0.073 (`ftjax eval`, whose batches are others: 59.8 %, 95 %:
53.6 to 65.6, margin 0.033 to 0.113). One run, seed 0, 2026-11-29, commit 53aaea6, and the same again the day after.
"""

from configs import base, dpo_smollm2_hh


def get_config(arg=""):
    config = dpo_smollm2_hh.experiment("reward", centering_coef=0.01)
    config.methods = ("lora", "value_head")
    config.value_head.bias = False  # the loss does not see it, and Hugging Face's classifiers have none
    return base.finish(config, arg, tiny="tiny-llama")
