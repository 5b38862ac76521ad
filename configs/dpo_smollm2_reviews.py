"""DPO on the pairs that the reward model of the RLHF study learns from: how far does it come without one?

Start and data: configs/reward_smollm2_reviews.py.
Command: ftjax train --config=configs/dpo_smollm2_reviews.py --workdir=runs/dpo_smollm2_reviews
Hardware: one core of an AMD EPYC, bfloat16, 12:47 min beside tests, 2.44 GB (JAX 0.12.0.1).
Result: the known reward of held-out beginnings 0.048 → 0.557 for 15.4 nats a completion, with β = 0.03 0.661 for 31.1; 61.1 % of
167 held-out pairs; one run each, seed 0, 2026-11-30 (experiments/rlhf_reviews).
"""

from configs import base, reward_smollm2_reviews


def get_config(arg=""):
    return base.finish(reward_smollm2_reviews.experiment("dpo", beta=0.1), arg, tiny="tiny-llama")
