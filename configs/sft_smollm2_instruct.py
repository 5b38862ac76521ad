"""Do 100 steps on T0's prompts and people's own tasks teach SmolLM2-135M-Instruct to answer briefly, in the form that is asked for?

Data: t0_sample.jsonl (10 rows of each of 294 prompt templates of P3), seed_tasks.jsonl and user_oriented_instructions.jsonl, of
github.com/yizhongw/self-instruct. The last 8 % of the T0 rows are held out; their exact match counts whole answers, summaries included.
Command: ftjax train --config=configs/sft_smollm2_instruct.py --workdir=runs/sft_smollm2_instruct
Hardware: 2 CPU cores, about 50 minutes beside other work and 2.2 GB (JAX 0.12.0.1, bfloat16).
Result: exact match 1.0 % -> 20.1 % of 194 held-out prompts, held-out loss 2.205; one run, seed 0, 2026-11-24 (experiments/sft_instruct).
"""

from configs import base

FOLDER = "data/self_instruct/"


def get_config(arg=""):
    config = base.sft()
    t0 = {"path": FOLDER + "t0_sample.jsonl", "end_marker": "<|endoftext|>"}
    config.data.sources.t0 = base.source(**t0, split="train[:92%]", weight=6.0)
    config.data.sources.seed = base.source(FOLDER + "seed_tasks.jsonl", weight=1.0)
    config.data.sources.user = base.source(FOLDER + "user_oriented_instructions.jsonl", weight=1.0)
    config.data.eval_sources.t0 = base.source(**t0, split="train[92%:]")
    config.data.update({"max_tokens": 512, "batch_size": 4})
    config.steps = 100
    config.optimizer.learning_rate = 5e-4
    config.eval.update({"every_steps": 50, "batches": 0})
    config.eval.generate.update({"examples": 200, "max_tokens": 48})
    config.checkpoint.every_steps = 50
    return base.finish(config, arg, tiny="tiny-llama")
