"""After SFT on right solutions, does DPO teach SmolLM2-135M to tell right solutions of GSM8K problems from wrong ones?

Start: configs/sft_smollm2_solutions.py, merged; its data too.
Command: ftjax train --config=configs/dpo_smollm2_solutions.py --workdir=runs/dpo_smollm2_solutions
Then: ftjax eval --config=configs/dpo_smollm2_solutions.py --adapter=runs/dpo_smollm2_solutions
Hardware: one core of an AMD EPYC. 35 minutes of its time (53 on the clock, beside other work) and 3.0 GB (JAX 0.12.0.1).
Result: of 378 held-out pairs 56.1 % (95 %: 51.1 to 61.0) have the larger reward on the right side, with a margin of 0.143; right solutions
become less likely too (reward -0.149). One run, seed 0, 2026-11-30, commit 2fcfbad.
"""

from configs import base


def experiment(algorithm, data, **loss):
    """The start, the data and the length of the run, which KTO's shares."""
    config = base.judged(algorithm, **loss)
    config.model.name = "runs/sft_smollm2_solutions/model"
    config.steps = 60
    config.data.sources.solutions = base.source(f"data/solutions/train_{data}.jsonl")
    config.data.eval_sources.solutions = base.source(f"data/solutions/test_{data}.jsonl")
    config.data.update({"max_tokens": 384, "batch_size": 4, "bad_rows": "skip"})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 6})
    config.eval.update({"every_steps": 30, "batches": 0})
    return config


def get_config(arg=""):
    return base.finish(experiment("dpo", "pairs", beta=0.1), arg, tiny="tiny-llama")
