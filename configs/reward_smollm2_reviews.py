"""Does a reward model learn a known reward, the share of favourable words, from pairs in which the more favourable one won?

Start: configs/sft_smollm2_reviews.py, merged, and its samples in pairs.
Data: python -m experiments.rlhf_reviews.pairs runs/sft_smollm2_reviews/model data/reviews
Command: ftjax train --config=configs/reward_smollm2_reviews.py --workdir=runs/reward_smollm2_reviews
Hardware: one core of an AMD EPYC, bfloat16, 5:46 min, 2.07 GB (JAX 0.12.0.1).
Result: 62.9 % of 167 held-out pairs, loss 0.741; one run, seed 0, 2026-11-30 (experiments/rlhf_reviews).
"""

from configs import base, sft_smollm2_reviews

START = "runs/sft_smollm2_reviews/model"


def experiment(algorithm, **loss):
    """The start and the pairs, which DPO's run shares."""
    config = base.judged(algorithm, **loss)
    config.model.name = START
    config.steps = 120
    config.data.sources.pairs = base.source(f"{sft_smollm2_reviews.FOLDER}/pairs_train.jsonl")
    config.data.eval_sources.pairs = base.source(f"{sft_smollm2_reviews.FOLDER}/pairs_test.jsonl")
    config.data.update({"max_tokens": 128, "batch_size": 6, "template": "none"})
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 5})
    config.eval.update({"every_steps": 30, "batches": 0})
    return config


def get_config(arg=""):
    config = experiment("reward", centering_coef=0.01)
    config.methods = ("lora", "value_head")
    config.value_head.bias = False
    config.steps, config.optimizer.learning_rate = 90, 5e-4
    return base.finish(config, arg, tiny="tiny-llama")
