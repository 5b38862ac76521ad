"""Rotary position embedding: queries and keys turn with their position, so that scores depend on distances alone.

Su et al. 2021, arXiv:2104.09864; the pairs are `(i, i + c/2)`, as in GPT-NeoX and Hugging Face, not `(2i, 2i + 1)`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the angular frequencies `theta^(-2i/c)`, float32 `[c/2]`, stretched as `rope.rope_type` says.

    `linear` divides all by `factor`: position interpolation (Chen et al. 2023, arXiv:2306.15595). `llama3` divides those whose wavelength
    is long against the original context, keeps the short ones and blends between (Llama 3.1, arXiv:2407.21783, section 3.4.2). `yarn` does
    so too, with a blend that is linear in i and not in the frequency (Peng et al. 2023, arXiv:2309.00071, section 3.2).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (1.0 / np.power(np.float32(rope.rope_theta), exponents)).astype(np.float32)
    if rope.rope_type == "default":
        return base
    if rope.rope_type == "linear":
        return (base / np.float32(rope.factor)).astype(np.float32)
    keep = _kept_by_yarn(rope, head_dim) if rope.rope_type == "yarn" else _kept_by_llama3(rope, base)
    return ((1 - keep) * base / rope.factor + keep * base).astype(np.float32)


def _kept_by_llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    """Return for each pair how much of its frequency is kept, from the turns that it makes within the original context."""
    turns = rope.original_max_position_embeddings * base.astype(np.float64) / (2 * np.pi)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)


def _kept_by_yarn(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the same for YaRN: 1 up to the pair that makes `beta_fast` turns, 0 from the one that makes `beta_slow`, a line between."""

    def pair(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # as transformers has it, where both bounds are one pair
    return 1 - np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)


def attention_factor(rope: Rope) -> float:
    """Return what YaRN multiplies cosines and sines by, 1 for the other kinds: `0.1 ln(factor) + 1`, unless the config has another.

    The scores are multiplied by its square, which sharpens the softmax over a longer context (Peng et al. 2023, arXiv:2309.00071,
    section 3.3). A config with `mscale` and `mscale_all_dim` has the quotient of `0.1 mscale ln(factor) + 1` and the same of the other.
    """
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    slope = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * slope + 1) / (rope.mscale_all_dim * slope + 1)
    return slope + 1


def table(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of `position * frequency`, float32 `[b, t, c/2]` each, times the attention factor."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(rope, head_dim))[None, None, :]
    cos, sin, factor = jnp.cos(angles), jnp.sin(angles), attention_factor(rope)
    return (cos, sin) if factor == 1.0 else (factor * cos, factor * sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Return `x` `[b, t, h, c]` turned by the angles of a table `[b, t, c/2]`: computed in float32, returned in the dtype of `x`."""
    # A CPU goes over a concatenation of halves four times; a TPU would have rows of half the width.
    return jax.lax.platform_dependent(x, cos, sin, cpu=_by_reversing, default=_by_halves)


def _by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _by_reversing(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = cos[:, :, None, None, :], sin[:, :, None, None, :] * jnp.array([-1.0, 1.0]).reshape(1, 1, 1, 2, 1)
    return (halves * cos + halves[..., ::-1, :] * sin).astype(x.dtype).reshape(x.shape)
