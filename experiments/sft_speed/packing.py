"""How much faster is an epoch if rows are packed? The time of each width of batch, measured, times how often an epoch has it.

Usage: python -m experiments.sft_speed.packing MODEL DATA.jsonl --dtype bfloat16 [--max_tokens 512] [--repeats 3]
A step is LoRA as in step.py. All kinds have the same positions a batch where full (4 x 512); padded ones have more rows of fewer tokens.
Prints a Markdown table.
"""

import argparse
from functools import partial

import jax

from experiments import epochs
from ftjax import data, losses, optimizers, peft, scoring, train
from ftjax.cli import runtime
from ftjax.hf import load

KINDS = {
    "packed (best_fit)": {"packing": "best_fit", "buckets": 1, "batch_size": 4},
    "padded to 4 widths": {"packing": "none", "buckets": 4, "batch_size": 4},
    "padded to 512": {"packing": "none", "buckets": 1, "batch_size": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    runtime.keep_memory()
    model, params, tokenizer, _ = load.load(args.model, dtype=args.dtype, remat="elementwise")
    encoder = data.make_encoder(tokenizer, max_tokens=args.max_tokens)
    sequences = data.encode(data.read({"path": args.data, "end_marker": "<|endoftext|>"}), encoder)
    tokens = int(sequences.lengths.sum())
    method = peft.lora("all-linear", rank=16, alpha=32)
    frozen, trainable = method.init(jax.random.key(0), params)
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=100)
    step = train.make_train_step(partial(scoring.score, model), method, losses.sft, optimizer)
    state = train.init_state(jax.random.key(0), trainable, method, optimizer)
    print(f"{len(sequences.lengths)} sequences, {tokens:,} tokens; {args.dtype}, JAX {jax.__version__}")
    loaders = {name: data.make_loader(sequences, max_tokens=args.max_tokens, seed=0, **options) for name, options in KINDS.items()}
    epochs.compare({name: (loader, step) for name, loader in loaders.items()}, state, frozen, tokens=tokens, repeats=args.repeats)


if __name__ == "__main__":
    main()
