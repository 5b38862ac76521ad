"""Time a QLoRA step beside a LoRA step over the same architecture, through the functions that `ftjax train` calls.

Usage: JAX_PLATFORMS=cuda python -m experiments.int4_speed.gpu_step [--preset llama-3-8b] [--rows 4] [--tokens 2048] [--steps 9]

Weights are random, so nothing is downloaded; NF4 in groups of 64 with nested scales, laid out for Hopper where the GPU is one. A time is
the median of the steps after the first two.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from ftjax import losses, models, optimizers, peft, quant, scoring, sharding, train, tree
from ftjax.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="llama-3-8b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--remat", default="full")
    args = parser.parse_args()
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {args.preset}, {args.rows} x {args.tokens} tokens\n")
    print("| step | base | seconds, median (range) | against LoRA |\n|---|---|---|---|")
    dense = None
    for name, packer in (("LoRA", None), ("QLoRA", quant.nf4(nested=True))):
        size, took = steps(args, packer)
        median = statistics.median(took)
        dense = dense or median
        print(f"| {name} | {size / 1e9:.3f} GB | {median:.4f} ({min(took):.4f}–{max(took):.4f}) | {median / dense:.2f} × |", flush=True)


def steps(args: argparse.Namespace, packer) -> tuple[int, list[float]]:
    """Return the bytes of the base and the seconds of each step."""
    model, key = models.build(models.preset(args.preset), remat=args.remat, dtype="bfloat16"), jax.random.key(0)
    start = model.init if packer is None else lambda key: packer.init(key, model.init(key))[0]
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    params = quant.for_device(jax.jit(start)(key), mesh)
    method = peft.lora("all-linear", rank=16, alpha=32)
    frozen, trainable = method.init(key, params)
    optimizer = optimizers.build("adamw", learning_rate=1e-4, steps=args.steps)
    step = train.make_train_step(partial(scoring.score, model), method, losses.sft, optimizer)
    state = train.init_state(key, trainable, method, optimizer)
    tokens = jax.random.randint(key, (args.rows, args.tokens), 0, model.config.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(args.tokens, dtype=jnp.int32), tokens.shape)
    batch, took = Batch(tokens, (positions > 0).astype(jnp.float32), positions, jnp.ones_like(positions)), []
    for _ in range(args.steps):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state.trainable, metrics))
        took.append(time.perf_counter() - began)
    return tree.num_bytes(params), took[2:]


if __name__ == "__main__":
    main()
