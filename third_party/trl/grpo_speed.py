"""Time GRPO steps of TRL's GRPOTrainer with PEFT on PyTorch: one side of experiments/rl_speed.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, peft==0.21.2, trl==1.16.0, gguf, datasets.
Usage: python third_party/trl/grpo_speed.py MODEL.gguf WORK.json --dtype bfloat16 --steps 4 [--autocast] [--checkpointing]
Prints one line of JSON. A step has 8 samples of 64 tokens of each of 8 prompts; none ends before, and the reward is the share of digits.
"""

import argparse
import json
import pathlib
import resource
import tempfile
import time

import datasets
import torch
import transformers
import trl
from peft import LoraConfig


class Ready(trl.GRPOTrainer):
    """Takes prompts that are tokens already, and says how long sampling takes."""

    tokens, sampling = [], []

    def _tokenize_prompts(self, prompts):
        return [self.tokens[int(prompt)] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        began = time.time()
        found = super()._generate_single_turn(*args, **kwargs)
        self.sampling.append(time.time() - began)
        return found


class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.seconds, self.rewards, self.lengths, self.ends = [], [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.time())
        self.seconds.append(self.ends[-1] - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.rewards.append(logs["reward"])
            self.lengths.append(logs["completions/mean_length"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--autocast", action="store_true", help="TRL's bf16: products in bfloat16, whatever their inputs are")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default: less memory, more time")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    began = time.time()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, tokenizer = dense(args.gguf, getattr(torch, args.dtype))
    Ready.tokens, clock = json.loads(args.work.read_text())["prompts"][: args.prompts], Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ready(
            model,
            reward_funcs=reward,
            args=settings(args, folder),
            train_dataset=datasets.Dataset.from_dict({"prompt": list(map(str, range(args.prompts)))}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    options = [name for name in ("autocast", "checkpointing") if getattr(args, name)]
    result = {
        "system": f"TRL {', '.join([args.dtype, *options])}",
        "seconds": clock.seconds[1:],
        "sampling": trainer.sampling[1:],
        "tokens": int(args.prompts * args.samples * clock.lengths[-1]),
        "first_step": clock.ends[0] - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "rewards": clock.rewards,
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
    count = args.prompts * args.samples
    return trl.GRPOConfig(
        folder,
        loss_type="grpo",
        beta=0.0,
        num_generations=args.samples,
        per_device_train_batch_size=count // args.accumulation,
        gradient_accumulation_steps=args.accumulation,
        steps_per_generation=args.accumulation,
        max_steps=args.steps,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        generation_kwargs={"min_new_tokens": args.max_tokens},
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


def reward(completions, **kwargs):
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


if __name__ == "__main__":
    main()
