"""Do twenty of SmolLM2-135M-Instruct's thirty layers learn to say what all thirty say?

The student starts as its teacher without layers 9, 11, …, 27 and is trained whole, by the Jensen–Shannon divergence and half the NLL of
the text, on the answers of T0. (Without training, on one batch: divergence 0.56, both find the same token most likely for 8 %, NLL 6.5
against 2.1; as every third layer 0.66, 0 % and 13.8, from where this divergence, at most log 2, has next to no gradient.)
Data: t0_sample.jsonl of github.com/yizhongw/self-instruct; its last 4 % are held out. What to look at: eval/divergence and eval/agreement.
Command: ftjax train --config=configs/distill_smollm2.py --workdir=runs/distill_smollm2
Local file: --config.data.sources.t0.path=t0_sample.jsonl --config.data.eval_sources.t0.path=t0_sample.jsonl
On-policy (GKD): --config.student.on_policy=0.5, half of the steps on what the student itself answers to the same prompts.
Hardware: one core of an AMD EPYC. 10:36 minutes and 7.0 GB (JAX 0.12.0.1), beside another run.
Result: held out, the divergence falls from 0.460 (step 10) to 0.406, 0.398, 0.381, 0.381, 0.370 and 0.370 (step 70), and both find the same
token most likely for 22.8, 27.7, 28.8, 31.2, 34.0, 34.7 and 33.0 %; NLL 6.01 to 4.58. One run, seed 0, 2026-11-30, commit 2fcfbad.
"""

from configs import base

FOLDER = "data/self_instruct/"


def get_config(arg=""):
    config = base.distilled("jsd")
    config.model.layers = (*range(9), *range(10, 29, 2), 29)
    config.loss.nll_coef = 0.5
    t0 = {"path": FOLDER + "t0_sample.jsonl", "end_marker": "<|endoftext|>"}
    config.data.sources.t0 = base.source(**t0, split="train[:96%]")
    config.data.eval_sources.t0 = base.source(**t0, split="train[96%:]")
    config.data.update({"max_tokens": 256, "batch_size": 4})
    config.steps = 70
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 5})
    config.eval.update({"every_steps": 10, "batches": 4})
    config.checkpoint.every_steps = 35
    return base.finish(config, arg, tiny="tiny-llama")
