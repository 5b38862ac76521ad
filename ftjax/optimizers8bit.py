"""AdamW and Lion with moments of eight bits: optax transformations whose state is a quarter of the size.

A moment is kept as the codes of a dynamic 8-bit number and one scale for each 256 of them, and is float32 only while a slab of a leaf is
updated (Dettmers et al. 2021, arXiv:2110.02861). Blocks run along a leaf as it lies in memory, all layers of a stack one after another.
Codes have the leaf's shape, so on a mesh they lie as the leaf does; the scales are replicated, and a step gathers the moments of one leaf
after another to find its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.quant import blockwise, codes

MIN_SIZE = 4096
"""Leaves of fewer numbers keep float32 moments, as in bitsandbytes."""
SLAB = 2**20
"""About as many numbers are float32 at a time."""
SIGNED, UNSIGNED = codes.dynamic(), codes.dynamic(signed=False)


class Moment(NamedTuple):
    """A running mean for each parameter."""

    values: Any
    """As the parameters: uint8 codes, or float32 numbers of a leaf that is small."""
    scales: Any
    """As the parameters: float32 `[blocks]`, or None where `values` is float32."""


class Adam8bitState(NamedTuple):
    """What AdamW remembers."""

    count: jax.Array
    mu: Moment
    """Of the gradient, with a sign."""
    nu: Moment
    """Of its square, without."""


class Lion8bitState(NamedTuple):
    """What Lion remembers."""

    mu: Moment


def scale_by_adam8bit(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, min_size: int = MIN_SIZE) -> optax.GradientTransformation:
    """Return Adam's rule with both moments in eight bits.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g²,   update = m / (1 - b1ᵗ) / (√(v / (1 - b2ᵗ)) + eps)

    The update is of m and v before they are rounded. Codes and scales are those of bitsandbytes 0.50 on a CPU. (Its CUDA kernel also
    moves the code of an m that was rounded to zero to the neighbour with the sign of m.)

    Args:
      b1: decay of m.
      b2: decay of v.
      eps: guard against division by zero, and against what is so small beside the largest of its block (10⁻⁷) that v is rounded to 0.
      min_size: leaves of fewer numbers keep float32 moments.
    """

    def init(params: Any) -> Adam8bitState:
        return Adam8bitState(jnp.zeros((), jnp.int32), _zero(params, min_size), _zero(params, min_size))

    def update(updates: Any, state: Adam8bitState, params: Any = None) -> tuple[Any, Adam8bitState]:
        del params
        count = optax.safe_increment(state.count)
        correct1, correct2 = (1 - b ** count.astype(jnp.float32) for b in (b1, b2))

        def rule(g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * jnp.square(g)
            return m / correct1 / (jnp.sqrt(v / correct2) + eps), m, v

        scaled, mu, nu = _by_leaf(rule, updates, (state.mu, SIGNED), (state.nu, UNSIGNED))
        return scaled, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_lion8bit(*, b1: float = 0.9, b2: float = 0.99, min_size: int = MIN_SIZE) -> optax.GradientTransformation:
    """Return Lion's rule (Chen et al. 2023, arXiv:2302.06675) with its moment in eight bits.

    update = sign(b1 m + (1 - b1) g),   m = b2 m + (1 - b2) g

    Args:
      b1: how much of m is in the update.
      b2: decay of m.
      min_size: leaves of fewer numbers keep float32 moments.
    """

    def init(params: Any) -> Lion8bitState:
        return Lion8bitState(_zero(params, min_size))

    def update(updates: Any, state: Lion8bitState, params: Any = None) -> tuple[Any, Lion8bitState]:
        del params

        def rule(g: jax.Array, m: jax.Array) -> tuple[jax.Array, ...]:
            return jnp.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

        signs, mu = _by_leaf(rule, updates, (state.mu, SIGNED))
        return signs, Lion8bitState(mu)

    return optax.GradientTransformation(init, update)


def _zero(params: Any, min_size: int) -> Moment:
    """Return the moment before the first step: where the scale is 0, any code stands for 0."""

    def values(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, jnp.uint8 if leaf.size >= min_size else jnp.float32)

    def scales(leaf: jax.Array) -> jax.Array | None:
        return jnp.zeros(blockwise.num_blocks(leaf.size), jnp.float32) if leaf.size >= min_size else None

    return Moment(jax.tree.map(values, params), jax.tree.map(scales, params))


Rule = Callable[..., tuple[jax.Array, ...]]
"""`(gradient, *moments) -> (update, *moments)`, number by number, in float32."""


def _by_leaf(rule: Rule, updates: Any, *moments: tuple[Moment, np.ndarray]) -> tuple[Any, ...]:
    """Return the updates and the moments after a rule; each moment comes with the book of its codes."""
    leaves, structure = jax.tree.flatten(updates)
    parts = [[structure.flatten_up_to(part) for part in moment] for moment, _ in moments]
    books = [book for _, book in moments]
    found = []
    for at, g in enumerate(leaves):
        values, scales = zip(*((part[0][at], part[1][at]) for part in parts), strict=True)
        if scales[0] is None:
            update, *after = rule(g, *values)
            found.append((update, *((moment, None) for moment in after)))
        else:
            found.append(_by_slab(rule, books, g, values, scales))
    updates, *after = zip(*found, strict=True)
    return structure.unflatten(updates), *(Moment(*(structure.unflatten(part) for part in zip(*one, strict=True))) for one in after)


def _by_slab(rule: Rule, books: Sequence[np.ndarray], g: jax.Array, values: Sequence[jax.Array], scales: Sequence[jax.Array]) -> tuple:
    """Return the update of one leaf and `(codes, scales)` of each of its moments, a slab of whole blocks after another."""

    def slab(parts: tuple) -> tuple:
        g, values, scales = parts
        update, *after = rule(g, *map(blockwise.unpack, values, scales, books))
        return update, *map(blockwise.pack, after, books)

    if (n := _slabs(g.shape)) == 1:
        return slab((g, values, scales))
    split = lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:])  # noqa: E731
    joined = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    return jax.tree.map(joined, jax.lax.map(slab, jax.tree.map(split, (g, tuple(values), tuple(scales)))))


def _slabs(shape: tuple[int, ...]) -> int:
    """Return into how many equal parts of whole blocks the first axis of a leaf is split: as many as leave `SLAB` numbers in each."""
    rows, numbers = shape[0], math.prod(shape)
    counts = (n for n in range(min(rows, max(1, numbers // SLAB)), 0, -1) if rows % n == 0 and numbers // n % blockwise.BLOCK == 0)
    return next(counts, 1)
