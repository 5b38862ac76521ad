"""How much faster is an epoch of DPO if pairs share rows? The time of each width of batch, measured, times how often an epoch has it.

Usage: python -m experiments.preference_speed.packing MODEL.gguf harmless_base_test.jsonl.gz --dtype bfloat16 [--max_tokens 512]
A step is that of step.py, its reference live. All kinds have the same positions a batch where full: 4 pairs of rows of `max_tokens`, or 4
packed rows twice as wide. Prints a Markdown table.
"""

import argparse
from functools import partial

import jax

from experiments import epochs
from ftjax import data, losses, optimizers, peft, scoring, train
from ftjax.cli import runtime
from ftjax.hf import load

KINDS = {
    "packed, a prompt once a pair": ("shared", 1),
    "packed, a prompt once a response": ("best_fit", 1),
    "padded to 4 widths": ("none", 4),
    "padded to one width": ("none", 1),
}
ROWS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    runtime.keep_memory()
    model, params, tokenizer, _ = load.load(args.model, dtype=args.dtype, remat="elementwise")
    encoder = data.make_encoder(tokenizer, max_tokens=args.max_tokens)
    items, _ = data.load_judged({"hh": {"path": args.rows}}, encoder, wanted=data.PAIRS, batch_size=ROWS, bad_rows="skip")
    tokens = int(items.sequences.lengths.sum())
    method = peft.lora("all-linear", rank=16, alpha=32)
    frozen, trainable = method.init(jax.random.key(0), params)
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=100)
    look = partial(scoring.score, model, outputs=("logps",))
    state = train.init_state(jax.random.key(0), trainable, method, optimizer)

    def complete(frozen, batch):
        return losses.with_reference(batch, look(frozen, batch))

    print(f"{len(items.sequences.lengths) // 2} pairs, {tokens:,} tokens; {args.dtype}, JAX {jax.__version__}")
    ways = {}
    for name, (packing, buckets) in KINDS.items():
        options = {"max_tokens": args.max_tokens, "packing": packing, "buckets": buckets, "responses": 2}
        loss = partial(losses.dpo, beta=0.1)
        loss = loss if packing == "none" else losses.unpacked(loss)
        step = train.make_train_step(look, method, loss, optimizer, complete=complete)
        ways[name] = data.make_loader(items.sequences, batch_size=ROWS, **options), step
    epochs.compare(ways, state, frozen, tokens=tokens, repeats=args.repeats)


if __name__ == "__main__":
    main()
