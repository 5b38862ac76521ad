"""Moments of some leaves set to zero, in the state of any optimiser: an array belongs to the leaf whose path its own ends with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.peft.riding import path_key

MATRIX = (-2, -1)


def _largest(moment: jax.Array, ratio: float, key: jax.Array) -> jax.Array:
    del key
    size = jnp.abs(moment)
    return size > jnp.quantile(size, ratio, axis=MATRIX, keepdims=True)


def _some(moment: jax.Array, ratio: float, key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, moment.shape) >= ratio


def _none(moment: jax.Array, ratio: float, key: jax.Array) -> jax.Array:
    del ratio, key
    return jnp.zeros(moment.shape, bool)


PRUNES: dict[str, Callable[[jax.Array, float, jax.Array], jax.Array]] = {"magnitude": _largest, "random": _some, "reset": _none}
"""`(moment [..., i, o], ratio, key) -> bool` of the same shape: what stays."""


def pruned(state: Any, shapes: Mapping[str, tuple[int, ...]], *, how: str, ratio: float, key: jax.Array) -> Any:
    """Return an optimiser's state with a share of some leaves' moments zeroed, the same entries in all moments of a leaf.

    The first one, Adam's m, says which. Were each to choose for itself, m could stay where the v that it is divided by went, and a leaf
    whose next gradient is zero, as LoRA's A beside B = 0, would take a step of m / eps.

    Args:
      state: of any optax transformation.
      shapes: the leaves, `{path: shape}`. A moment of another shape (Adafactor's, which are factored) is zeroed altogether, and so is
        one in eight bits: its scales are.
      how: one of `PRUNES`; "magnitude" looks at each matrix of a stack by itself.
      ratio: the share that is zeroed, in [0, 1].
      key: of "random".
    """
    stays: dict[str, jax.Array] = {}

    def one(path: Any, array: jax.Array) -> jax.Array:
        whole = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = next((leaf for leaf in shapes if whole.endswith(f"/{leaf}")), None)
        if leaf is None:
            return array
        if array.shape != shapes[leaf] or not jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros_like(array)
        if leaf not in stays:
            stays[leaf] = PRUNES[how](array, ratio, path_key(key, leaf))
        return jnp.where(stays[leaf], array, jnp.zeros_like(array))

    return jax.tree_util.tree_map_with_path(one, state)
