"""Does DPO on human preferences for harmlessness teach SmolLM2-135M-Instruct to tell them apart?

Command: ftjax train --config=configs/dpo_smollm2_hh.py --workdir=runs/dpo_smollm2_hh
Local file: --config.data.sources.hh.path=harmless_base_test.jsonl.gz --config.data.eval_sources.hh.path=harmless_base_test.jsonl.gz
  --config.data.sources.hh.split=train[256:] --config.data.eval_sources.hh.split=train[:256]
Hardware: one core of an AMD EPYC. 13:03 minutes and 2.6 GB (JAX 0.12.0.1), beside another run.
Result: from the local file, of 251 held-out pairs 60.6 % (95 %: 54.4 to 66.4) have the larger reward on the chosen side, with a margin of
0.060; the chosen responses hardly become less likely (reward -0.029). One run, seed 0, 2026-11-29, commit 53aaea6.
"""

from configs import base


def experiment(algorithm, **loss):
    """The preferences and the length of the runs, which the other configs of this data share."""
    config = base.judged(algorithm, **loss)
    config.steps = 80
    config.data.sources.hh = base.source("Anthropic/hh-rlhf")
    config.data.eval_sources.hh = base.source("Anthropic/hh-rlhf", split="test[:256]")
    config.data.update({"max_tokens": 256, "batch_size": 4, "bad_rows": "skip"})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 10})
    config.eval.update({"every_steps": 40, "batches": 0})
    return config


def get_config(arg=""):
    return base.finish(experiment("dpo", beta=0.1), arg, tiny="tiny-llama")
