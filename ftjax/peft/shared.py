"""An array that many leaves read and that no scan slices: one copy for all layers of all leaves."""

from __future__ import annotations

import jax


class Shared:
    """Carries an array in the static part of a leaf, equal to itself alone.

    A scan slices every array of its operand, so an array that all layers share would need a copy for each of them. What is static it
    leaves as it is, and the layer then reads the array as one from outside, as a function reads a variable around it. No gradient is
    taken of it. `attach` inside `jit` wraps what it was given, so that nothing becomes a constant of the program.
    """

    def __init__(self, array: jax.Array):
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shared) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)

    def __repr__(self) -> str:
        return f"Shared({self.array.dtype}{list(self.array.shape)})"
