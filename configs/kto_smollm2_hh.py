"""Does KTO, which sees each response alone with a label, learn from the same preferences as DPO?

Command: ftjax train --config=configs/kto_smollm2_hh.py --workdir=runs/kto_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: UNTESTED at full length.
"""

from configs import base


def get_config(arg=""):
    config = base.judged("kto", beta=0.1)
    config.steps = 80
    config.data.sources.hh = base.source("Anthropic/hh-rlhf")
    config.data.eval_sources.hh = base.source("Anthropic/hh-rlhf", split="test[:256]")
    config.data.update({"max_tokens": 256, "batch_size": 8, "bad_rows": "skip"})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 10})
    config.eval.update({"every_steps": 40, "batches": 0})
    return base.finish(config, arg, tiny="tiny-llama")
