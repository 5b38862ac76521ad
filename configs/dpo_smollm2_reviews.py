"""DPO on the pairs that the reward model of the RLHF study learns from: how far does it come without one?

Start and data: configs/reward_smollm2_reviews.py.
Command: ftjax train --config=configs/dpo_smollm2_reviews.py --workdir=runs/dpo_smollm2_reviews
Hardware: UNTESTED at full length.
"""

from configs import base, reward_smollm2_reviews


def get_config(arg=""):
    return base.finish(reward_smollm2_reviews.experiment("dpo", beta=0.1), arg, tiny="tiny-llama")
