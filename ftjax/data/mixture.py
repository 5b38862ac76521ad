"""The order of examples, computed by index: seeded permutations and weighted mixtures without any state.

`Mixture.draw(i)` is a pure function of (sizes, weights, seed, i), so any position of a run can be reached without replay.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

PERIOD = 10_000
"""A weighted mixture repeats its pattern of sources after so many draws, and its proportions are exact in each period."""


def permute(index: np.ndarray, size: int, *, seed: int, stream: int = 0, epoch: int | np.ndarray = 0) -> np.ndarray:
    """Return the places of `index` in a pseudo-random permutation of `range(size)`.

    Four rounds of a Feistel network over the smallest even number of bits that holds `size`; results outside the range are sent through
    again ("cycle walking", Black & Rogaway 2002) until all are inside: at most four times as many values as the range has.

    Args:
      index: int `[n]`, each from 0 to `size - 1`.
      size: the length of the permutation.
      seed: with `stream` and `epoch`, chooses the permutation. `epoch` may be one number for each index.
      stream: see `seed`.
      epoch: see `seed`.
    """
    index = np.asarray(index, np.uint64)
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    key = _mix(np.uint64(seed % 2**64) ^ _mix(np.uint64(stream) ^ _mix(np.broadcast_to(np.asarray(epoch, np.uint64), index.shape))))
    out = index.copy()
    walking = np.ones(index.shape, bool)
    while walking.any():
        left, right, keys = out[walking] >> half, out[walking] & low, key[walking]
        for turn in range(4):
            left, right = right, left ^ (_mix(right ^ keys ^ _mix(np.uint64(turn))) & low)
        out[walking] = (left << half) | right
        walking = out >= np.uint64(size)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every bit of the result depends on every bit of `x`."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An endless stream of rows from several sources.

    Without weights it is all rows of all sources, shuffled anew each epoch, each exactly once an epoch. With weights source `s` gets
    its share of the draws, spread as evenly as can be (any window of `n` draws holds `n` times its share, give or take two), and
    each source goes through its own rows in its own shuffled epochs: a small source with a large weight is repeated sooner.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int
    shuffle: bool = True

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"data: a mixture needs at least one row of each source, got sizes {self.sizes}")
        if self.weights is not None:
            if len(self.weights) != len(self.sizes) or not all(0 < weight < float("inf") for weight in self.weights):
                raise ValueError(f"data: {len(self.sizes)} sources need as many positive weights, got {self.weights}")
            if min(self.weights) / sum(self.weights) < 1 / PERIOD:
                raise ValueError(f"data: a weight below 1/{PERIOD:,} of the total would never be drawn: {self.weights}")

    @property
    def epoch_size(self) -> int:
        """Draws in an epoch: as many as all sources have rows."""
        return sum(self.sizes)

    def draw(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `(source [n], row of that source [n])` of the draws `index [n]`."""
        index = np.asarray(index, np.int64)
        if self.weights is None:
            row = self._order(index, self.epoch_size, stream=0)
            stops = np.cumsum(self.sizes)
            source = np.searchsorted(stops, row, side="right")
            return source, row - (stops - np.asarray(self.sizes))[source]
        pattern, before = _pattern(self.weights)
        source = pattern[index % PERIOD]
        counts = np.bincount(pattern, minlength=len(self.sizes))
        nth = (index // PERIOD) * counts[source] + before[index % PERIOD]
        row = np.empty_like(source)
        for s, size in enumerate(self.sizes):
            here = source == s
            row[here] = self._order(nth[here], size, stream=s + 1)
        return source, row

    def source_of(self, index: int) -> int:
        """Return the source of draw `index`."""
        return int(self.draw(np.asarray([index]))[0][0])

    def row_of(self, index: int) -> int:
        """Return the row, within its source, of draw `index`."""
        return int(self.draw(np.asarray([index]))[1][0])

    def _order(self, nth: np.ndarray, size: int, *, stream: int) -> np.ndarray:
        if not self.shuffle:
            return nth % size
        return permute(nth % size, size, seed=self.seed, stream=stream, epoch=nth // size)


@functools.lru_cache(maxsize=8)
def _pattern(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each draw of a period, and how often that source was drawn before in it.

    Shares are rounded to whole draws by largest remainder; draw `j` of a source with `c` of them wants to stand at `(j + 1/2) / c`.
    """
    exact = np.asarray(weights) / np.sum(weights) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]] += 1
    source = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((nth + 0.5) / counts[source], kind="stable")
    return source[order], nth[order]
