"""Does KTO, which sees each response alone with a label, learn from the same preferences as DPO?

Command: ftjax train --config=configs/kto_smollm2_hh.py --workdir=runs/kto_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: one core of an AMD EPYC. 43 minutes of its time (66 on the clock, beside other work) and 2.7 GB (JAX 0.12.0.1), half of it for the
two evaluations, which have a padded row for each response and another for each mismatched one.
Result: from the local file, of 251 held-out pairs 59.0 % (95 %: 52.8 to 64.9) have the larger reward on the chosen side. One run, seed 0,
2026-11-30, commit 2fcfbad (its mismatched rows could lose their BOS, and pair two responses to one prompt).
"""

from configs import base, dpo_smollm2_hh


def get_config(arg=""):
    config = dpo_smollm2_hh.experiment("kto", beta=0.1)
    config.data.batch_size = 8
    return base.finish(config, arg, tiny="tiny-llama")
