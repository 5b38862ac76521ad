"""Does KTO, which sees each response alone with a label, learn from the same preferences as DPO?

Command: ftjax train --config=configs/kto_smollm2_hh.py --workdir=runs/kto_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: UNTESTED at full length.
"""

from configs import base, dpo_smollm2_hh


def get_config(arg=""):
    config = dpo_smollm2_hh.experiment("kto", beta=0.1)
    config.data.batch_size = 8
    return base.finish(config, arg, tiny="tiny-llama")
