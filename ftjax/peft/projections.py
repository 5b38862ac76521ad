"""Random projections as PEFT draws them, so that a seed means the same matrices here and there.

PyTorch's CPU generator is the Mersenne Twister seeded as NumPy's `RandomState`; a uniform number takes the low 24 bits of a draw in
float32 and the low 8 in bfloat16.
"""

from __future__ import annotations

import math

import numpy as np


class TorchGenerator:
    """Uniform numbers equal to those of `torch.Generator("cpu").manual_seed(seed)`."""

    def __init__(self, seed: int):
        self.bits = np.random.RandomState(seed)

    def uniform(self, shape: tuple[int, ...], bound: float, *, digits: int = 24) -> np.ndarray:
        """Return float32 numbers in [-bound, bound) with `digits` random bits."""
        draws = self.bits.randint(0, 2**32, size=math.prod(shape), dtype=np.uint32)
        unit = (draws & np.uint32(2**digits - 1)).astype(np.float32) * np.float32(2.0**-digits)
        low, high = np.float32(-bound), np.float32(bound)
        return (unit * (high - low) + low).reshape(shape)
