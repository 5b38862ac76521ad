"""Leaves of the trainable tree that a method moves by itself: the optimiser of the run neither sees them nor keeps moments of them."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.types import Params


def unseen(rule: optax.GradientTransformation, hidden: Callable[[str], bool]) -> optax.GradientTransformation:
    """Return `rule` over all leaves but those whose path `hidden` selects; their updates are zero.

    Example:
      >>> rule = unseen(optax.adam(0.1), lambda path: path.endswith("/past"))
      >>> params = {"a": jnp.ones(2), "b": {"past": jnp.ones(3)}}
      >>> tree.size(rule.init(params)) - tree.size(optax.adam(0.1).init({"a": params["a"]}))
      0
    """

    def seen(leaves: Params) -> Params:
        return tree.unflatten({path: leaf for path, leaf in tree.flatten(leaves).items() if not hidden(path)})

    def init(params: Params) -> optax.OptState:
        return rule.init(seen(params))

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        moved, state = rule.update(seen(updates), state, None if params is None else seen(params))
        found = tree.flatten(moved)
        return tree.unflatten({path: found.get(path, jnp.zeros_like(leaf)) for path, leaf in tree.flatten(updates).items()}), state

    return optax.GradientTransformation(init, update)
