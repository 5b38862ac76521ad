"""After SFT on right solutions, does KTO, which sees single solutions and whether they are right, teach what DPO's pairs do?

Start: configs/sft_smollm2_solutions.py, merged; its data too.
Command: ftjax train --config=configs/kto_smollm2_solutions.py --workdir=runs/kto_smollm2_solutions
Then: ftjax eval --pairs --data=data/solutions/test_pairs.jsonl --model=runs/sft_smollm2_solutions/model \
  --adapter=runs/kto_smollm2_solutions
Hardware: UNTESTED at full length.
"""

from configs import base, dpo_smollm2_solutions


def get_config(arg=""):
    config = dpo_smollm2_solutions.experiment("kto", "labelled", beta=0.1, desirable_weight=1.6)  # 38 % of them are right
    config.data.update({"max_tokens": 256, "batch_size": 8})
    config.eval.batches = 20
    return base.finish(config, arg, tiny="tiny-llama")
