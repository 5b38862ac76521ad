"""Time LoRA steps of ftjax: one side of the comparison, through the same functions that `ftjax train` calls.

Usage: python experiments/sft_speed/step.py MODEL TOKENS.npy --dtype bfloat16 --remat none --steps 4 [--base nf4]
Prints one line of JSON. TOKENS.npy is int `[steps, b, t]`; every token but the first of a row is trained.
"""

import argparse
import json
import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import losses, optimizers, peft, quant, scoring, train, tree
from ftjax.cli import runtime
from ftjax.hf import load
from ftjax.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--base", default="", choices=("", *quant.METHODS), help="the format of the frozen matrices; empty: dense")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cache", help="folder of the persistent compile cache")
    args = parser.parse_args()
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    runtime.keep_memory()
    began = time.time()
    model, params, *_ = load.load(args.model, dtype=args.dtype, remat=args.remat)
    lora = peft.lora("all-linear", rank=16, alpha=32)
    method = peft.chain(quant.METHODS[args.base](), lora) if args.base else lora
    frozen, trainable = method.init(jax.random.key(0), params)
    del params
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=args.steps)
    step = train.make_train_step(partial(scoring.score, model), method, losses.sft, optimizer)
    state = train.init_state(jax.random.key(0), trainable, method, optimizer)
    batches = np.load(args.tokens).astype(np.int32)
    rows, time_axis = batches.shape[1:]
    positions = jnp.broadcast_to(jnp.arange(time_axis, dtype=jnp.int32), (rows, time_axis))
    mask, segments = (positions > 0).astype(jnp.float32), jnp.ones_like(positions)
    seconds, seen = [], []
    for index in range(args.steps):
        start = time.time()
        state, metrics = step(state, frozen, Batch(jnp.asarray(batches[index % len(batches)]), mask, positions, segments))
        seen.append(metrics["loss"].value())
        seconds.append(time.time() - start)
        if index == 0:
            first = time.time() - began
    print(
        json.dumps(
            {
                "system": " ".join(filter(None, ("ftjax", args.base, f"{args.dtype} (JAX {jax.__version__}, remat {args.remat})"))),
                "seconds": seconds[1:],
                "tokens": rows * time_axis,
                "first_step": first,
                "base_gb": sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)) / 1e9,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "losses": seen,
                "trainable": tree.size(state.trainable),
            }
        )
    )


if __name__ == "__main__":
    main()
