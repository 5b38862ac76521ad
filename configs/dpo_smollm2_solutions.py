"""After SFT on right solutions, does DPO teach SmolLM2-135M to tell right solutions of GSM8K problems from wrong ones?

Start: configs/sft_smollm2_solutions.py, merged; its data too.
Command: ftjax train --config=configs/dpo_smollm2_solutions.py --workdir=runs/dpo_smollm2_solutions
Then: ftjax eval --config=configs/dpo_smollm2_solutions.py --adapter=runs/dpo_smollm2_solutions
Hardware: UNTESTED at full length.
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
