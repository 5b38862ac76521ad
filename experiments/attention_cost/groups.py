"""What shifted groups (S², a quarter of the row each) save of the time and memory of attention.

Usage: python experiments/attention_cost/groups.py [--tokens 4096 8192] [--dtype bfloat16] [--heads 9 --key_heads 3 --repeats 5]
Prints a table of one attention of one row, SmolLM2's heads by default, in processor seconds: the least of a few calls.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from ftjax.cli import runtime
from ftjax.kernels import attention


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key_heads", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    runtime.keep_memory()
    print(f"JAX {jax.__version__}, {jax.default_backend()}, {args.dtype}, {args.heads} query heads on {args.key_heads}\n")
    print("| tokens | keys | forward | with gradients | temporaries | compile |\n|---|---|---|---|---|---|")
    for t in args.tokens:
        for name, group_tokens in (("all before", None), (f"groups of {t // 4:,}", t // 4)):
            forward, both, memory, compile_time = measure(t, group_tokens, args)
            print(f"| {t:,} | {name} | {forward:.2f} s | {both:.2f} s | {memory / 1e6:.0f} MB | {compile_time:.1f} s |", flush=True)


def measure(t: int, group_tokens: int | None, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Return processor seconds of a forward pass and of one with gradients; of the latter, bytes of temporaries, seconds to compile."""
    shapes = {"q": (1, t, args.heads, 64), "k": (1, t, args.key_heads, 64), "v": (1, t, args.key_heads, 64)}
    arrays = {name: jax.random.normal(jax.random.key(i), shape, args.dtype) for i, (name, shape) in enumerate(shapes.items())}
    positions, ones = jnp.arange(t, dtype=jnp.int32)[None], jnp.ones((1, t), jnp.int32)
    ids = {"q_positions": positions, "kv_positions": positions, "q_segment_ids": ones, "kv_segment_ids": ones}
    attend = functools.partial(attention.attention, scale=64**-0.5, group_tokens=group_tokens)

    def loss(arrays, ids):
        return jnp.sum(jnp.square(attend(**arrays, **ids).astype(jnp.float32)))

    forward = jax.jit(lambda arrays, ids: attend(**arrays, **ids)).lower(arrays, ids).compile()
    began = time.process_time()
    both = jax.jit(jax.grad(loss)).lower(arrays, ids).compile()
    compile_time = time.process_time() - began
    times = [min(seconds(run, arrays, ids) for _ in range(args.repeats)) for run in (forward, both)]
    return *times, both.memory_analysis().temp_size_in_bytes, compile_time


def seconds(run, *args) -> float:
    """Return the processor time of one call, of all cores together: what other programs take is not in it."""
    began = time.process_time()
    jax.block_until_ready(run(*args))
    return time.process_time() - began


if __name__ == "__main__":
    main()
