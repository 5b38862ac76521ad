"""Time generation of ftjax: two sides of the comparison, the engine and static batches.

Usage: python experiments/generation_speed/side.py MODEL.gguf WORK.json --system engine --load mixed --dtype bfloat16 --rows 32
With --system groups it is 8 samples of each of 8 prompts, as a step of GRPO asks for, each prompt read once.
Prints one line of JSON. The whole load is generated once before it is timed, so that nothing is compiled within.
"""

import argparse
import functools
import json
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import rollout
from ftjax.cli import runtime
from ftjax.hf import load


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--system", choices=tuple(SYSTEMS), default="engine")
    parser.add_argument("--load", default="uniform")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=32, help="slots, or rows of a batch")
    parser.add_argument("--patience", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    runtime.keep_memory()
    work = json.loads(args.work.read_text())
    found = load.load(args.model, dtype=args.dtype)
    prompts = [np.asarray(prompt, np.int32) for prompt in work["prompts"]]
    lengths = work["lengths"][args.load] or [work["most"]] * len(prompts)
    eos_ids = work["eos_ids"] if work["lengths"][args.load] is None else ()
    generate = SYSTEMS[args.system]
    seconds = []
    for _ in range(1 + args.repeats):
        began = time.perf_counter()
        tokens = generate(found, prompts, lengths, eos_ids, args)
        seconds.append(time.perf_counter() - began)
    floor, parts = floor_seconds(found, sum(map(len, prompts)), tokens, args)
    result = {
        "system": f"ftjax {args.system} {args.dtype}, {args.rows} rows (JAX {jax.__version__})",
        "load": args.load,
        "tokens": tokens,
        "seconds": seconds[1:],
        "first": seconds[0],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "floor_seconds": floor,
        "floor": parts,
    }
    print(json.dumps(result))


def through_slots(found, prompts, lengths, eos_ids, args) -> int:
    """Return the number of tokens that the engine wrote."""
    engine = rollout.Engine(found.model, eos_ids, slots=args.rows, patience=args.patience)
    requests = [rollout.Request(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    return sum(len(sample.tokens) for sample in engine.generate(found.params, requests))


def in_groups(found, prompts, lengths, eos_ids, args, *, together: bool = True) -> int:
    """Return the number of tokens of `GROUP` samples of as many prompts as make the whole load, each prompt read once or once a sample."""
    engine = rollout.Engine(found.model, (), slots=args.rows)
    chosen = prompts[: len(prompts) // GROUP]
    if together:
        requests = [rollout.Request(prompt, length, num_samples=GROUP) for prompt, length in zip(chosen, lengths, strict=False)]
    else:
        requests = [rollout.Request(prompt, length) for prompt, length in zip(chosen, lengths, strict=False) for _ in range(GROUP)]
    return sum(len(sample.tokens) for sample in engine.generate(found.params, requests))


def in_batches(found, prompts, lengths, eos_ids, args) -> int:
    """Return the number of tokens that static batches of prompts of like length wrote; a batch goes on until its longest has ended."""
    order, total = sorted(range(len(prompts)), key=lambda at: -len(prompts[at])), 0
    for first in range(0, len(order), args.rows):
        chosen = order[first : first + args.rows]
        wanted = [lengths[at] for at in chosen]
        batch = rollout.pad([prompts[at] for at in chosen], rows=args.rows)
        written = rollout.generate(found.model, found.params, *batch, max_tokens=max(wanted), eos_ids=eos_ids or (-1,))
        total += int(np.minimum(np.asarray(written.lengths)[: len(chosen)], wanted).sum())
    return total


GROUP = 8
"""Samples of a prompt."""
SYSTEMS = {
    "engine": through_slots,
    "static": in_batches,
    "groups": in_groups,
    "groups, prompts once a sample": functools.partial(in_groups, together=False),
}


def floor_seconds(found, read: int, written: int, args) -> tuple[float, dict]:
    """Return the least time of this work on this machine: matrices at the rate of products of many rows, and read once a step.

    A step of `rows` tokens takes as long as its FLOPs or as reading the weights, whichever is longer; keys and values are not counted.
    """
    matrices = sum(x.nbytes for x in jax.tree.leaves(found.params))
    size = sum(x.size for x in jax.tree.leaves(found.params))  # the head is tied, so the embedding is multiplied by once
    head = found.params["embed_tokens"]["kernel"].size
    rate, bandwidth = product_rate(args.dtype), read_rate()
    steps = -(-written // args.rows)
    reading = 2 * (size - head) * read / rate
    step = max(matrices / bandwidth, 2 * size * args.rows / rate)
    return reading + steps * step, {"gflops": rate / 1e9, "gb_s": bandwidth / 1e9, "step_ms": 1e3 * step, "read_seconds": reading}


def product_rate(dtype: str) -> float:
    """Return the FLOP/s of a product of 512 rows."""
    x, w = jnp.ones((512, 2048), dtype), jnp.ones((2048, 2048), dtype)
    run = jax.jit(lambda x, w: jax.lax.fori_loop(0, 8, lambda _, x: x @ w * jnp.asarray(0.5, x.dtype), x))
    return 8 * 2 * 512 * 2048 * 2048 / best(run, x, w)


def read_rate() -> float:
    """Return the bytes/s of adding up an array that no cache holds."""
    x = jnp.ones((64, 2**20), jnp.float32)
    return x.nbytes / best(jax.jit(lambda x: jnp.sum(x, axis=1)), x)


def best(run, *arguments) -> float:
    """Return the least of some times."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
