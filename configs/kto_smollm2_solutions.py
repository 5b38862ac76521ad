"""After SFT on right solutions, does KTO, which sees single solutions and whether they are right, teach what DPO's pairs do?

Start: configs/sft_smollm2_solutions.py, merged; its data too.
Command: ftjax train --config=configs/kto_smollm2_solutions.py --workdir=runs/kto_smollm2_solutions
Then: ftjax eval --pairs --data=data/solutions/test_pairs.jsonl --split=train --row_tokens=384 \
  --model=runs/sft_smollm2_solutions/model --adapter=runs/kto_smollm2_solutions
Hardware: one core of an AMD EPYC. 28 minutes of its time (71 on the clock, beside and behind other work) and 2.8 GB (JAX 0.12.0.1).
Result: of 376 held-out pairs 59.3 % (95 %: 54.3 to 64.2) have the larger reward on the right side (DPO 56.1 %); of 160 held-out solutions
right ones have the reward -0.102, wrong ones -0.205. One run, seed 0, 2026-11-30, commit 2fcfbad.
"""

from configs import base, dpo_smollm2_solutions


def get_config(arg=""):
    config = dpo_smollm2_solutions.experiment("kto", "labelled", beta=0.1, desirable_weight=1.6)  # 38 % of them are right
    config.data.update({"max_tokens": 256, "batch_size": 8})
    config.eval.batches = 20
    return base.finish(config, arg, tiny="tiny-llama")
