"""AdamW and Lion with moments of eight bits: optax transformations whose state is a quarter of the size.

A moment is kept as the codes of a dynamic 8-bit number and one scale for each 256 of them, and is float32 only while a leaf is updated
(Dettmers et al. 2021, arXiv:2110.02861). Blocks run along a leaf as it lies in memory, all layers of a stack one after another. Codes have
the leaf's shape, so on a mesh they lie as the leaf does; the scales are replicated, and a step gathers the moments of one leaf after
another to find its blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.quant import blockwise, codes

MIN_SIZE = 4096
"""Leaves of fewer numbers keep float32 moments, as in bitsandbytes."""
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
        mu, nu = _read(state.mu, updates, SIGNED), _read(state.nu, updates, UNSIGNED)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), nu, updates)
        correct1, correct2 = (1 - b ** count.astype(jnp.float32) for b in (b1, b2))
        scaled = jax.tree.map(lambda m, v: m / correct1 / (jnp.sqrt(v / correct2) + eps), mu, nu)
        return scaled, Adam8bitState(count, _write(mu, state.mu, SIGNED), _write(nu, state.nu, UNSIGNED))

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
        mu = _read(state.mu, updates, SIGNED)
        signs = jax.tree.map(lambda m, g: jnp.sign(b1 * m + (1 - b1) * g), mu, updates)
        mu = jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, mu, updates)
        return signs, Lion8bitState(_write(mu, state.mu, SIGNED))

    return optax.GradientTransformation(init, update)


def _zero(params: Any, min_size: int) -> Moment:
    """Return the moment before the first step: where the scale is 0, any code stands for 0."""

    def values(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, jnp.uint8 if leaf.size >= min_size else jnp.float32)

    def scales(leaf: jax.Array) -> jax.Array | None:
        return jnp.zeros(blockwise.num_blocks(leaf.size), jnp.float32) if leaf.size >= min_size else None

    return Moment(jax.tree.map(values, params), jax.tree.map(scales, params))


def _write(moment: Any, like: Moment, book: np.ndarray) -> Moment:
    """Return a tree of float32 numbers with those leaves in eight bits that were so before."""
    leaves, structure = jax.tree.flatten(moment)
    packed = structure.flatten_up_to(like.scales)
    pairs = [(leaf, None) if scales is None else blockwise.pack(leaf, book) for leaf, scales in zip(leaves, packed, strict=True)]
    return Moment(*(structure.unflatten([pair[n] for pair in pairs]) for n in range(2)))


def _read(moment: Moment, like: Any, book: np.ndarray) -> Any:
    """Return the tree of float32 numbers."""
    return jax.tree.map(
        lambda _, values, scales: values if scales is None else blockwise.unpack(values, scales, book), like, moment.values, moment.scales
    )
