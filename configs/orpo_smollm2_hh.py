"""Does ORPO, which needs no reference and no SFT before it, learn the same preferences as DPO?

Command: ftjax train --config=configs/orpo_smollm2_hh.py --workdir=runs/orpo_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: UNTESTED at full length.
"""

from configs import base, dpo_smollm2_hh


def get_config(arg=""):
    config = dpo_smollm2_hh.experiment("orpo", beta=0.1)
    return base.finish(config, arg, tiny="tiny-llama")
