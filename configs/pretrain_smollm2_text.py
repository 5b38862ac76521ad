"""Continued pretraining: every token of a text corpus, documents end to end, all weights trained.

Command: ftjax train --config=configs/pretrain_smollm2_text.py --workdir=runs/pretrain_smollm2_text
Your own text: --config.data.sources.text.path=FOLDER --config.data.eval_sources.text.path=FILE.txt
Hardware: one 16 GB GPU; on 2 CPU cores a step takes minutes. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    config.methods = ("full",)
    config.data.sources.text = base.source("Salesforce/wikitext", name="wikitext-103-raw-v1", format="text")
    config.data.eval_sources.text = base.source("Salesforce/wikitext", name="wikitext-103-raw-v1", format="text", split="validation")
    config.data.update({"max_tokens": 1024, "batch_size": 32, "accumulation": 4, "packing": "wrapped", "train_on": "all"})
    config.optimizer.update({"learning_rate": 1e-4, "schedule": "wsd", "warmup_steps": 50, "weight_decay": 0.1, "b2": 0.95})
    return base.finish(config, arg, tiny="tiny-llama")
