"""Time the Hopper kernels on a GPU beside a bfloat16 matmul, and beside other tiles than the one that is chosen.

Usage: JAX_PLATFORMS=cuda python -m experiments.int4_speed.gpu [--formats int4,nf4] [--rows 1,16] [--sides 4096x4096,8192x28672] [--tiles]

A time is the median of 9 rounds of enough products in one program to take some milliseconds, each on a matrix of its own, so that the cache
of the GPU does not hold the next: what bfloat16 reads 16 bits for, the kernels read 4 for. *Bandwidth* counts packed codes, scales and rows
once. *Error* is relative, against float64 on the host, of 8 rows.

Where PyTorch for CUDA and bitsandbytes are installed, their kernels are timed in the same run (peers.py; with
XLA_PYTHON_CLIENT_PREALLOCATE=false, so that JAX leaves them memory). Whole steps: gpu_step.py.
"""

import argparse
import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.int4_speed import peers
from ftjax.kernels.int4_matmul import Packed, decode, hopper
from ftjax.kernels.int4_matmul.hopper_tiles import SHARED_BYTES, Tile, forward_bytes, forward_tile, transposed_tile
from ftjax.quant import SPECS, quantize

CACHE = 50e6
"""Bytes that an H100 keeps near."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", default="int4,nf4")
    parser.add_argument("--rows", default="1,16,256,2048")
    parser.add_argument("--sides", default="4096x4096,4096x14336,14336x4096,8192x28672", help="ixo of the matrices")
    parser.add_argument("--tiles", action="store_true", help="time every tile of x D, not only the chosen one")
    args = parser.parse_args()
    if reason := hopper.unfit_device():
        raise SystemExit(f"int4_speed: {reason}")
    device, absent = jax.devices()[0], peers.missing()
    print(f"JAX {jax.__version__}, {device.device_kind}, groups of 64{'; ' + absent if absent else ''}\n")
    print("| i x o | rows | product | format | tile | time | against bfloat16 | bandwidth | error |\n|---|---|---|---|---|---|---|---|---|")
    for side in args.sides.split(","):
        i, o = map(int, side.split("x"))
        for m in map(int, args.rows.split(",")):
            for transposed in (False, True):
                base = compare(i, o, m, transposed, args)
                if not absent:
                    beside(i, o, m, transposed, base)


def compare(i: int, o: int, m: int, transposed: bool, args: argparse.Namespace) -> float:
    """Print the rows of one shape, bfloat16 first; return the seconds of that."""
    x = jax.random.normal(jax.random.key(0), (m, o if transposed else i), jnp.bfloat16)
    copies = matrices(i, o)
    dense = jax.random.normal(jax.random.key(1), (i, o), jnp.bfloat16)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    base = seconds(lambda x, w: jax.lax.dot_general(x, w, contract), x, jnp.stack([dense] * copies))
    line = f"| {i} x {o} | {m} | {'x Dᵀ' if transposed else 'x D'} |"
    print(f"{line} bfloat16 | | {base * 1e6:.1f} µs | 1.00 × | {bandwidth(base, 2 * i * o, m, i, o)} | |", flush=True)
    for format in args.formats.split(","):
        w = quantize(dense, format)
        packed = decode.by_outputs(Packed(w.codes, w.scales, w.zeros))
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * copies), packed)
        sides = [leaf for leaf in packed[1:] if leaf is not None]
        size = i * o // 2 + sum(4 * side.size for side in sides)
        for tile in tiles(m, i, o, len(sides), transposed, args.tiles):
            run = functools.partial(hopper.product_transposed if transposed else hopper.product, SPECS[format], tile=tile)
            took = seconds(run, x, stack)
            result = (
                f"{took * 1e6:.1f} µs | {base / took:.2f} × | {bandwidth(took, size, m, i, o)} | {error(run, x, packed, w, transposed):.1e}"
            )
            print(f"{line} {format} | {tuple(tile)} | {result} |", flush=True)
    return base


def beside(i: int, o: int, m: int, transposed: bool, base: float) -> None:
    """Print the peers' rows of one shape."""
    for name, took in peers.times(i, o, m, transposed=transposed, copies=matrices(i, o)):
        result = took if isinstance(took, str) else f"{took * 1e6:.1f} µs | {base / took:.2f} ×"
        print(f"| {i} x {o} | {m} | {'x Dᵀ' if transposed else 'x D'} | {name} | | {result} | | |", flush=True)


def matrices(i: int, o: int) -> int:
    """Return how many packed matrices no cache holds."""
    return max(4, int(np.ceil(2 * CACHE / (i * o / 2))))


def tiles(m: int, i: int, o: int, sides: int, transposed: bool, every: bool) -> list[Tile]:
    """Return the tile that is chosen, and every other one of `x D` that fits if they are asked for."""
    if transposed:
        return [transposed_tile(m, i, o, group=64, sides=sides)]
    chosen = forward_tile(m, i, o, group=64, sides=sides)
    if not every:
        return [chosen]
    found = {chosen: None}
    for rows, depth, splits, stages in itertools.product((8, 16, 32, 64, 128, 256), (64, 128, 256), (1, 2, 4, 8), (3, 4, 6, 8)):
        tile = chosen._replace(rows=rows, depth=depth, splits=splits, stages=stages)
        small = rows <= 16 or (depth == 64 and (splits == 1 or rows <= 64))
        if small and rows < 2 * max(m, 8) and i % (splits * depth) == 0 and forward_bytes(tile, 64, sides) <= SHARED_BYTES - 1024:
            found[tile] = None
    return list(found)


def seconds(product, x: jax.Array, stack) -> float:
    """Return the time of one product: of a program with one for each matrix of a stack, less that of an empty one."""
    each = [jax.tree.map(lambda leaf, at=at: leaf[at], stack) for at in range(jax.tree.leaves(stack)[0].shape[0])]
    run = jax.jit(lambda x, matrices: [product(x, w) for w in matrices])
    nothing = jax.jit(lambda x: x + 1)

    def once(function, *arguments) -> float:
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - began

    once(run, x, each), once(nothing, x)
    rounds = [once(run, x, each) - once(nothing, x) for _ in range(9)]
    return statistics.median(rounds) / len(each)


def bandwidth(took: float, size: int, m: int, i: int, o: int) -> str:
    return f"{(size + 2 * m * (i + o)) / took / 1e9:.0f} GB/s"


def error(run, x: jax.Array, packed: Packed, w, transposed: bool) -> float:
    dense = np.asarray(w.materialize(), np.float64)
    expected = np.asarray(x[:8], np.float64) @ (dense.T if transposed else dense)
    found = np.asarray(jax.jit(run)(x, packed)[:8], np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
