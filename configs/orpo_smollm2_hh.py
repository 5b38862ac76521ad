"""Does ORPO, which needs no reference and no SFT before it, learn the same preferences as DPO?

Command: ftjax train --config=configs/orpo_smollm2_hh.py --workdir=runs/orpo_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: UNTESTED at full length.
"""

from configs import base


def get_config(arg=""):
    config = base.judged("orpo", beta=0.1)
    config.steps = 80
    config.data.sources.hh = base.source("Anthropic/hh-rlhf")
    config.data.eval_sources.hh = base.source("Anthropic/hh-rlhf", split="test[:256]")
    config.data.update({"max_tokens": 256, "batch_size": 4, "bad_rows": "skip"})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 10})
    config.eval.update({"every_steps": 40, "batches": 0})
    return base.finish(config, arg, tiny="tiny-llama")
