"""Rotary position embedding: queries and keys turn with their position, so that scores depend on distances alone.

Su et al. 2021, arXiv:2104.09864; the pairs are `(i, i + c/2)`, as in GPT-NeoX and Hugging Face, not `(2i, 2i + 1)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the angular frequencies `theta^(-2i/c)`, float32 `[c/2]`, stretched as `rope.rope_type` says.

    `linear` divides all by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides those whose wavelength is long against the
    original context, keeps the short ones and blends between (Llama 3.1, arXiv:2407.21783, section 3.4.2).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (1.0 / np.power(np.float32(rope.rope_theta), exponents)).astype(np.float32)
    if rope.rope_type == "default":
        return base
    if rope.rope_type == "linear":
        return (base / np.float32(rope.factor)).astype(np.float32)
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    turns = context * base.astype(np.float64) / (2 * np.pi)  # full turns within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * base / rope.factor + keep * base).astype(np.float32)


def table(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of `position * frequency`, float32 `[b, t, c/2]` each."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(rope, head_dim))[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Return `x` `[b, t, h, c]` turned by the angles of a table `[b, t, c/2]`: computed in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
