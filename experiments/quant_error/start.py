"""How far from the dense model training over a quantised base starts: with plain LoRA, and with LoftQ.

Usage: python experiments/quant_error/start.py MODEL [--tokens 512]

OPENBLAS_NUM_THREADS=1 makes the decompositions many times faster where other work keeps the cores busy.

Prints, for text of this repository's README, the mean change of the logits, the loss, and the seconds that the start took, in float32.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp

from ftjax import peft, quant, weights
from ftjax.hf import load

CASES = {
    "nf4, LoRA": peft.chain(quant.nf4(), peft.lora(rank=16)),
    "nf4, LoRA from PiSSA": peft.chain(quant.nf4(), peft.lora(rank=16, init="pissa")),
    **{
        f"LoftQ, rank {rank}, {count} iteration{'s' * (count > 1)}": peft.loftq(rank=rank, iterations=count)
        for rank, count in ((16, 1), (16, 5), (64, 1), (64, 5))
    },
    "LoftQ, rank 16, 1 iteration, randomised SVD": peft.loftq(rank=16, svd_iterations=4),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    model, params, tokenizer, _ = load.load(args.model, dtype="float32")
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    tokens = jnp.asarray(tokenizer(text)["input_ids"][: args.tokens], jnp.int32)[None]

    @jax.jit
    def outcome(params):
        logits = model.unembed(model.head(params), model.apply(params, tokens)[0])[0]
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[0, 1:, None], axis=1)
        return logits, -jnp.mean(logps)

    dense, loss = outcome(params)
    print(f"| start | mean change of a logit | loss | seconds |\n|---|---|---|---|\n| dense | 0 | {float(loss):.4f} | |", flush=True)
    for name, method in CASES.items():
        began = time.process_time()
        frozen, trainable = jax.block_until_ready(jax.jit(method.init)(jax.random.key(0), params))
        took = time.process_time() - began
        logits, loss = outcome(weights.dense(method.attach(frozen, trainable)))
        print(f"| {name} | {float(jnp.mean(jnp.abs(logits - dense))):.4f} | {float(loss):.4f} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
