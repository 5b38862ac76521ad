"""Does ORPO, which needs no reference and no SFT before it, learn the same preferences as DPO?

Command: ftjax train --config=configs/orpo_smollm2_hh.py --workdir=runs/orpo_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: one core of an AMD EPYC. 9:20 minutes and 2.5 GB (JAX 0.12.0.1), beside another run.
Result: hardly. Of 251 held-out pairs 54.6 % (95 %: 48.4 to 60.6) are told apart (53.8 % at step 40; DPO 60.6 %), with a margin of
0.007, while the chosen responses become likelier (2.51 -> 2.46 nats a token from step 40 to 80). One run, seed 0, 2026-11-29, commit
53aaea6.
"""

from configs import base, dpo_smollm2_hh


def get_config(arg=""):
    config = dpo_smollm2_hh.experiment("orpo", beta=0.1)
    return base.finish(config, arg, tiny="tiny-llama")
