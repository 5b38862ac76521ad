"""The mean of float32 numbers, added in the order in which PyTorch 2.13 adds them: its last bit is PyTorch's too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 8
"""Numbers in a vector of PyTorch's on an x86 CPU, whatever vectors that CPU has."""
CHAINS = 4
"""Vectors in a row, each of which has a sum of its own."""
LEVELS = 4


def mean(x: Float[Array, " n"]) -> Float[Array, ""]:
    """Return the mean: that of `torch.mean` on one thread of an x86 CPU, bit for bit.

    Number k of the first 32 ⌊n / 32⌋ belongs to sum k mod 32 of 32. A sum adds 16 numbers in turn, then 16 such sums, and so on for four
    levels (more than 16 from 2²⁴ numbers on); what is left over on a level is added last. PyTorch splits 32,768 numbers and more between
    its threads, and has other orders on a GPU: its last bit may be another there.
    """
    lanes = LANES if x.size >= LANES else 1
    vectors = x[: x.size // lanes * lanes].reshape(-1, lanes)
    full = len(vectors) // CHAINS * CHAINS
    chains = _by_levels(vectors[:full].reshape(-1, CHAINS, lanes))
    summed = _in_turn(chains[1:], _in_turn(vectors[full:], chains[0]))
    total = _in_turn(summed, _in_turn(x[vectors.size :], jnp.zeros((), x.dtype)))
    # A divisor that the compiler knows it makes a product with a rounded 1 / n; behind a barrier too, where JAX 0.10 has its older fusions.
    return jax.lax.scan(lambda total, divisor: (total / divisor, None), total, jnp.asarray([1, x.size], x.dtype))[0]


def _by_levels(rows: jax.Array) -> jax.Array:
    """Return the sum of `[n, …]` over n."""
    step = 1 << max(4, max(0, len(rows) - 1).bit_length() // LEVELS)
    left = []
    for _ in range(LEVELS - 1):
        whole = len(rows) // step * step
        left.append(_in_turn(rows[whole:], jnp.zeros(rows.shape[1:], rows.dtype)))
        steps = jnp.moveaxis(rows[:whole].reshape(-1, step, *rows.shape[1:]), 1, 0)
        rows = _in_turn(steps, jnp.zeros(steps.shape[1:], rows.dtype))
    highest = _in_turn(rows, jnp.zeros(rows.shape[1:], rows.dtype))
    return _in_turn(jnp.stack([*left[1:], highest]), left[0])


def _in_turn(rows: jax.Array, start: jax.Array) -> jax.Array:
    """Return start plus each row of `[n, …]`, one after another."""
    return jax.lax.scan(lambda total, row: (total + row, None), start, rows)[0] if len(rows) else start
