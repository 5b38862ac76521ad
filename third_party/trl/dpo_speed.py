"""Time DPO steps of TRL's DPOTrainer with PEFT on PyTorch: one side of experiments/preference_speed.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, peft==0.21.2, trl==1.16.0, gguf, datasets.
Usage: python third_party/trl/dpo_speed.py MODEL.gguf PAIRS.npz --dtype bfloat16 --steps 4 [--autocast] [--reference cached]
Prints one line of JSON. PAIRS.npz has `prompts`, `chosen` and `rejected`: tokens `[n, t]`; a step has `--rows` pairs.
"""

import argparse
import json
import pathlib
import resource
import tempfile
import time

import datasets
import numpy as np
import torch
import transformers
import trl
from peft import LoraConfig


class Ready(trl.DPOTrainer):
    """Takes pairs that are tokens already, in their order."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.seconds, self.losses, self.ends = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.time())
        self.seconds.append(self.ends[-1] - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("pairs", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--autocast", action="store_true", help="TRL's bf16: products in bfloat16, whatever their inputs are")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default: less memory, more time")
    parser.add_argument("--reference", default="live", choices=("live", "cached"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    began = time.time()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, tokenizer = dense(args.gguf, getattr(torch, args.dtype))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ready(
            model,
            args=settings(args, folder),
            train_dataset=pairs(args),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    options = [name for name in ("autocast", "checkpointing") if getattr(args, name)]
    result = {
        "system": f"TRL {', '.join([args.dtype, *options])}, reference {args.reference}",
        "seconds": clock.seconds[1:],
        "tokens": 2 * args.rows * sum(np.load(args.pairs)[name].shape[1] for name in ("prompts", "chosen")),
        "first_step": clock.ends[0] - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "losses": clock.losses,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    print(json.dumps(result))


def dense(path, dtype):
    """Return the model of a GGUF file with plain weights, as a folder of them would give it, and the tokenizer."""
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    unpacked = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, quantization_config=unpacked)
    model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(**source)


def settings(args, folder):
    return trl.DPOConfig(
        folder,
        beta=0.1,
        per_device_train_batch_size=args.rows,
        max_steps=args.steps,
        max_length=None,
        precompute_ref_log_probs=args.reference == "cached",
        gradient_checkpointing=args.checkpointing,
        bf16=args.autocast,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def pairs(args):
    """Return the pairs of all steps, one after the other."""
    with np.load(args.pairs) as file:
        at = np.arange(args.steps * args.rows) % len(file["prompts"])
        columns = {theirs: file[ours][at].tolist() for ours, theirs in NAMES.items()}
    return datasets.Dataset.from_dict(columns)


NAMES = {"prompts": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}


if __name__ == "__main__":
    main()
