"""Do ten of SmolLM2-135M-Instruct's thirty layers, chosen evenly, learn to say what all thirty say?

The student starts as layers 0, 3, 6, … of its teacher and is trained whole, by the Jensen–Shannon divergence, on the answers of T0.
Data: t0_sample.jsonl of github.com/yizhongw/self-instruct; its last 4 % are held out. What to look at: eval/divergence and eval/agreement,
how often both find the same token most likely.
Command: ftjax train --config=configs/distill_smollm2.py --workdir=runs/distill_smollm2
Local file: --config.data.sources.t0.path=t0_sample.jsonl --config.data.eval_sources.t0.path=t0_sample.jsonl
Hardware: UNTESTED at full length; meant for 2 CPU cores, 10 minutes.
"""

from configs import base

FOLDER = "data/self_instruct/"


def get_config(arg=""):
    config = base.distilled("jsd")
    config.model.layers = tuple(range(0, 30, 3))
    t0 = {"path": FOLDER + "t0_sample.jsonl", "end_marker": "<|endoftext|>"}
    config.data.sources.t0 = base.source(**t0, split="train[:96%]")
    config.data.eval_sources.t0 = base.source(**t0, split="train[96%:]")
    config.data.update({"max_tokens": 256, "batch_size": 4})
    config.steps = 100
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 10})
    config.eval.update({"every_steps": 25, "batches": 8})
    config.checkpoint.every_steps = 50
    return base.finish(config, arg, tiny="tiny-llama")
