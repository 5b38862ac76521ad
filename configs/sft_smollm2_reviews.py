"""The start of the RLHF study: SmolLM2-135M-Instruct goes on with reviews of films, goods and restaurants as people wrote them.

Data: python experiments/rlhf_reviews/data.py T0_SAMPLE.jsonl data/reviews
Command: ftjax train --config=configs/sft_smollm2_reviews.py --workdir=runs/sft_smollm2_reviews
Then: ftjax merge --workdir=runs/sft_smollm2_reviews --output=runs/sft_smollm2_reviews/model
Hardware: one core of an AMD EPYC. 5:33 minutes and 1.9 GB (JAX 0.12.0.1), beside other work.
Result: held-out passages come to 3.717 (step 20), 3.650 and 3.643 nats a token. One run, seed 0, 2026-11-30, commit 094a117.
"""

from configs import base

FOLDER = "data/reviews"


def get_config(arg=""):
    config = base.sft()
    config.steps = 60
    config.data.sources.reviews = base.source(f"{FOLDER}/train.jsonl")
    config.data.eval_sources.reviews = base.source(f"{FOLDER}/test.jsonl")
    config.data.update({"max_tokens": 256, "batch_size": 4, "template": "none"})
    config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 5})
    config.eval.update({"every_steps": 20, "batches": 0})
    return base.finish(config, arg, tiny="tiny-llama")
