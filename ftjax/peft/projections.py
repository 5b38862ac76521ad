"""Random projections as PEFT draws them, so that a seed means the same matrices here and there.

PyTorch's CPU generator is the Mersenne Twister seeded as NumPy's `RandomState`; a uniform number takes the low 24 bits of a draw.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16).type


class TorchGenerator:
    """Uniform numbers equal to those of `torch.Generator("cpu").manual_seed(seed)`."""

    def __init__(self, seed: int):
        self.bits = np.random.RandomState(seed)

    def uniform(self, shape: tuple[int, ...], low: float, high: float, *, dtype=np.float32) -> np.ndarray:
        """Return numbers in [low, high), float32 or bfloat16."""
        draws = self.bits.randint(0, 2**32, size=math.prod(shape), dtype=np.uint32)
        unit = (draws & np.uint32(2**24 - 1)).astype(np.float64) * 2.0**-24
        start = np.float32(low)
        width = np.float32(high) - start
        # One rounding of the product and the sum, as a fused multiply-add; what then rounds to the open end goes to the other.
        values = (unit * np.float64(width) + np.float64(start)).astype(np.float32).astype(dtype)
        return np.where(values == dtype(high), dtype(low), values).reshape(shape)


def kaiming(generator: TorchGenerator, shape: tuple[int, ...]) -> np.ndarray:
    """Return U(±√(6 / columns)): VeRA's."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[-1]))
    return generator.uniform(shape, -bound, bound)


def _uniform_bases(generator: TorchGenerator, rank: int, small: int, large: int) -> tuple[np.ndarray, np.ndarray]:
    """Return RandLoRA's a `[r, small]` and b `[large, n, r]`, uniform in bfloat16 and divided by their standard deviation."""

    def draw(rows: int, columns: int) -> np.ndarray:
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + 5)) / math.sqrt(columns))
        return generator.uniform((rows, columns), -bound, bound, dtype=BFLOAT16)

    a = draw(rank, small)
    b = np.stack([draw(large, rank) for _ in range(-(-small // rank))], axis=1)
    return tuple((x.astype(np.float32) / np.float32(_deviation(x).astype(x.dtype))).astype(x.dtype).astype(np.float32) for x in (a, b))


def _sparse_bases(generator: TorchGenerator, rank: int, small: int, large: int, *, very: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return bases of -1, 0 and 1 with as many of either sign, divided by their standard deviation."""
    sparsity = math.sqrt(small) if very else 3

    def draw(*shape: int) -> np.ndarray:
        x = generator.uniform(shape, 0.0, 1.0)
        signs = np.where(x < 1 / (2 * sparsity), -1.0, np.where(x > 1 - 1 / (2 * sparsity), 1.0, 0.0)).astype(np.float32)
        return signs / _deviation(signs).astype(np.float32)

    return draw(rank, small), draw(large, -(-small // rank), rank)


def _deviation(x: np.ndarray) -> np.ndarray:
    return np.std(x.astype(np.float64), ddof=1)


BASES = {
    "uniform": _uniform_bases,
    "sparse": functools.partial(_sparse_bases, very=False),
    "very_sparse": functools.partial(_sparse_bases, very=True),
}
