"""Eight bits a number and a scale for 256 of them, whatever their shape: how scales are kept, and the moments of an optimiser."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ftjax.quant import codes

BLOCK = 256
TINY = 2e-38
"""What a block of zeros is divided by: normal, for XLA takes what is smaller for 0."""


def pack(x: Float[Array, "*b"], book: np.ndarray) -> tuple[UInt8[Array, "*b"], Float[Array, " n"]]:
    """Return the codes of the numbers of a book that are nearest to x / s, and s, the largest magnitude of each 256 in a row.

    Dettmers et al. 2021, arXiv:2110.02861, section 2; `ftjax.quant.codes.dynamic` is the book. The last block may be shorter.
    """
    flat = x.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    found = codes.nearest(blocks * (1.0 / jnp.maximum(scales, TINY))[:, None], book)
    return found.reshape(-1)[: flat.size].reshape(x.shape), scales


def num_blocks(size: int) -> int:
    """Return how many scales so many numbers have."""
    return -(-size // BLOCK)


def unpack(found: UInt8[Array, "*b"], scales: Float[Array, " n"], book: np.ndarray) -> Float[Array, "*b"]:
    """Return what the codes stand for, float32; the inverse of `pack` but for what that rounds away."""
    numbers = jnp.asarray(book)[found.astype(jnp.int32)]
    return (numbers.reshape(-1) * jnp.repeat(scales, BLOCK)[: found.size]).reshape(found.shape)
