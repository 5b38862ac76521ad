"""Compile the DPO step from shapes alone and say what memory it asks for, and how many logits it holds at a time; nothing is computed.

Usage: python experiments/preference_speed/memory.py [--preset smollm2-135m] [--rows 4] [--tokens 512] [--dtype bfloat16]

The reference is the frozen tree in the same step, or its log-probabilities come with the batch, or it is a second model beside the first.
"""

import argparse
import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp

from ftjax import losses, models, optimizers, peft, scoring, train
from ftjax.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    model = models.build(dataclasses.replace(models.preset(args.preset), dtype=args.dtype), remat="elementwise")
    print(f"{args.preset}, {args.rows} pairs of {args.tokens} tokens, {args.dtype}, JAX {jax.__version__}")
    print("| reference | arguments | temporaries | logits that exist at a time | of those of all tokens |")
    print("|---|---|---|---|---|")
    for reference in ("live", "cached", "a second model"):
        compiled = compile_step(model, args, reference)
        memory, most = compiled.memory_analysis(), largest(compiled.as_text(), model.config.vocab_size)
        every = 2 * args.rows * args.tokens * model.config.vocab_size
        print(
            f"| {reference} | {memory.argument_size_in_bytes / 1e9:.3f} GB | {memory.temp_size_in_bytes / 1e9:.3f} GB "
            f"| {most:,} | {100 * most / every:.1f} % |"
        )


def compile_step(model, args, reference: str):
    method = peft.lora("all-linear", rank=16, alpha=32)
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=100)
    look = partial(scoring.score, model, outputs=("logps",))
    frozen, trainable = jax.eval_shape(lambda key: method.init(key, model.init(key)), jax.random.key(0))
    state = jax.eval_shape(lambda trainable: train.init_state(jax.random.key(0), trainable, method, optimizer), trainable)
    ids, mask = (jax.ShapeDtypeStruct((args.rows, 2, args.tokens), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ids, mask, ids, ids, reference_logps=mask if reference == "cached" else None)

    def step(state, frozen, other, batch):
        anchor = other if reference == "a second model" else frozen

        def complete(frozen, batch):
            return batch if reference == "cached" else losses.with_reference(batch, look(anchor, batch))

        return train.make_train_step(look, method, partial(losses.dpo, beta=0.1), optimizer, complete=complete)(state, frozen, batch)

    other = frozen if reference == "a second model" else None
    return jax.jit(step, donate_argnums=0).lower(state, frozen, other, batch).compile()


def largest(program: str, vocabulary: int) -> int:
    """Return the most entries of any array of a program that has an axis of the vocabulary's size and is not the embedding `[v, d]`."""
    sizes = [0]
    for dimensions in set(re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", program)):
        shape = list(map(int, dimensions.split(",")))
        if shape[-1] == vocabulary and len(shape) > 1:
            sizes.append(math.prod(shape))
    return max(sizes)


if __name__ == "__main__":
    main()
