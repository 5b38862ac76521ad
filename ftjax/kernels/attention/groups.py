"""Shifted sparse attention (S²): half of the heads see groups of the row, the other half groups that begin half a group earlier.

Chen et al. 2023, LongLoRA, arXiv:2309.12307, section 3.2. A group is `group_tokens` consecutive positions of a document; attention inside
groups costs O(t · group) instead of O(t²), and what one half of the heads cannot see across a border, the other half can, so that
information flows through the layers. It is for training alone: the model is evaluated, and used, with all keys before a query.

To a causal query its group is a window, as wide as the query stands deep in the group. So S² is no attention of its own here, but a window
for every query of every head:

    window = (position + shift) mod group + 1,  shift = 0 in the first h // 2 query heads, group / 2 in the others

Where we differ: the authors roll the tokens of half the heads by half a group, which puts the first half group of the row behind the last
one, in the same group and after it in the causal order: there the beginning of the row sees its end, the future. Here the first and the
last half group are groups of their own. And groups count from the beginning of a document, not of the row, so packing changes nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def problem(group_tokens: int | None) -> str | None:
    """Return what is wrong with the size of a group, or None."""
    if group_tokens is None or (group_tokens > 0 and group_tokens % 2 == 0):
        return None
    return f"group_tokens must be a positive even number, for half the heads shift by half of it, not {group_tokens}"


def apart(k: jax.Array, v: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """Return keys and values `[b, s, k, c]` with as many heads as it takes that each serves query heads of one half only.

    The halves are of query heads, as in the paper; where a key head serves both, heads are repeated.
    """
    shared = num_heads // k.shape[2]
    times = shared // math.gcd(num_heads // 2, shared)
    return (k, v) if times == 1 else (jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2))


def windows(positions: jax.Array, group_tokens: int, *, num_heads: int, num_key_heads: int) -> jax.Array:
    """Return int `[b, k, t]`: how many positions each query sees, itself included, for key heads from `apart`."""
    shared = num_heads // num_key_heads
    shifts = [group_tokens // 2 if head * shared >= num_heads // 2 else 0 for head in range(num_key_heads)]
    return (positions[:, None, :] + jnp.asarray(shifts, positions.dtype)[None, :, None]) % group_tokens + 1
