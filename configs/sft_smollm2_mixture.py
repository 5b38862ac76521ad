"""Instruction tuning on a mixture: FLAN for breadth, Alpaca for chat, Dolly for human answers, by weight and not by size.

Command: ftjax train --config=configs/sft_smollm2_mixture.py --workdir=runs/sft_smollm2_mixture
Local files instead: --config.data.sources.alpaca.path=alpaca.json and so on; each format is told from its columns.
Hardware: one 16 GB GPU, or 2 CPU cores with `--config.steps=200 --config.data.batch_size=4`. UNTESTED
"""

from configs import base


def get_config(arg=""):
    config = base.sft()
    columns = {"prompt": "inputs", "completion": "targets"}
    config.data.sources.flan = base.source(
        "Muennighoff/flan", format="prompt_completion", split="train[:100000]", weight=2.0, columns=columns
    )
    config.data.sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[:98%]", weight=1.0)
    config.data.sources.dolly = base.source("databricks/databricks-dolly-15k", split="train[:95%]", weight=1.0)
    config.data.eval_sources.alpaca = base.source("yahma/alpaca-cleaned", split="train[98%:]")
    config.data.eval_sources.dolly = base.source("databricks/databricks-dolly-15k", split="train[95%:]")
    config.data.update({"max_tokens": 1024, "batch_size": 32, "accumulation": 2, "bad_rows": "skip"})
    config.neftune.alpha = 5.0
    config.methods = ("lora", "neftune")
    config.early_stopping.patience = 5
    config.eval.samples = 2
    return base.finish(config, arg, tiny="tiny-llama")
