"""RLHF in full: does PPO raise the known reward behind the pairs, by way of a reward model that has seen only who won?

`rewards/sentiment` is the known reward. It is watched, with weight 0; the policy learns from the reward model alone.
Start: configs/sft_smollm2_reviews.py, merged; the reward model: configs/reward_smollm2_reviews.py.
Command: ftjax train --config=configs/ppo_smollm2_reviews.py --workdir=runs/ppo_smollm2_reviews
Hardware: one core of an AMD EPYC, bfloat16, 15 min, 3.7 GB (JAX 0.12.0.1).
Result: the known reward of held-out beginnings 0.048 → 0.521, 0.614, 0.587 (seeds 0 to 2), for 15 to 21 nats a completion, 2026-11-30
(experiments/rlhf_reviews).
"""

from ml_collections import ConfigDict

from configs import base, reward_smollm2_reviews, sft_smollm2_reviews


def get_config(arg=""):
    config = base.online("ppo")
    config.model.name = reward_smollm2_reviews.START
    config.methods = ("lora", "value_head")
    config.steps = 80
    config.data.sources.reviews = base.source(f"{sft_smollm2_reviews.FOLDER}/train.jsonl")
    config.data.eval_sources.reviews = base.source(f"{sft_smollm2_reviews.FOLDER}/test.jsonl")
    config.data.update({"max_tokens": 128, "batch_size": 32, "template": "none"})
    config.rewards.sentiment = 0.0
    config.rewards.reward_model = ConfigDict({"folder": "runs/reward_smollm2_reviews", "weight": 1.0})
    config.rollout.update({"samples_per_prompt": 1, "minibatches": 2, "max_tokens": 40, "kl_penalty": 0.02})
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 5})
    config.eval.update({"every_steps": 40, "batches": 4})
    config.checkpoint.every_steps = 20
    config.logging.every_steps = 4
    if arg == "smoke":  # which has no reward model
        config.rewards = ConfigDict({"sentiment": 1.0})
    return base.finish(config, arg, tiny="tiny-llama")
