"""Code books: the few numbers between -1 and 1 that a code stands for, and which of them is nearest."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 4-bit NormalFloat: quantiles of a normal distribution, with an exact zero (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""

_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, -_FP4])
"""A 4-bit float with a sign, two bits of exponent and one of fraction, divided by its largest; as bitsandbytes orders it."""


def dynamic(*, signed: bool = True) -> np.ndarray:
    """Return the 256 numbers of the dynamic 8-bit code, ascending (Dettmers 2016, arXiv:1511.04561).

    ± 10^(k - 6) · m for k = 0 … 6, with m the middles of 2^k equal parts of [0.1, 1]; and 0 and 1. Without signs the parts are 2^(k + 1)
    (Dettmers et al. 2021, arXiv:2110.02861). Bit for bit those of bitsandbytes.
    """
    numbers = [0.0, 1.0]
    for k in range(7):
        fractions = _parts(2**k if signed else 2 ** (k + 1))
        numbers += [sign * x for sign in ((1, -1) if signed else (1,)) for x in (np.float32(10.0 ** (k - 6)) * fractions).tolist()]
    return np.sort(np.array(numbers, np.float32))


def _parts(count: int) -> np.ndarray:
    """Return the middles of equal parts of [0.1, 1], with the roundings of `torch.linspace`: the step once, then each bound once."""
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count))
    index = np.arange(count + 1)
    bounds = np.where(index < (count + 1) // 2, np.float32(0.1) + step * index, 1 - step * (count - index)).astype(np.float32)
    return (bounds[:-1] + bounds[1:]) / np.float32(2)


def nearest(values: Float[Array, "*b"], book: np.ndarray) -> UInt8[Array, "*b"]:
    """Return the codes of the numbers of a book that are nearest to float32 values; halfway the lower number.

    Of two equal numbers, as FP4's zeros, the first is taken.
    """
    order = np.argsort(book, kind="stable").astype(np.uint8)
    middles = (book[order[:-1]] + book[order[1:]]) / np.float32(2)
    if len(book) > 16:
        return jnp.asarray(order)[jnp.searchsorted(jnp.asarray(middles), values, side="left")]
    place = sum(((values > middle).astype(jnp.uint8) for middle in middles), jnp.zeros(values.shape, jnp.uint8))  # one fusion
    return jnp.asarray(order)[place.astype(jnp.int32)]
