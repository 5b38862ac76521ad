"""A reference for methods that train the base itself: a copy of what they move, kept in the frozen tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.peft.full import Moved
from ftjax.types import Params, Transform

REFERENCE = "reference"
"""The branch of the frozen tree that holds the copies."""


def anchored(method: Transform) -> Transform:
    """Return the method with a frozen tree that `reference` makes a whole model of: one copy more of the leaves that are trained in full.

    A method that moves no leaf is the same as before: its frozen tree is the reference, and nothing is copied. (Of LoftQ that is the packed
    base alone, which is not where its training starts.)
    """

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        frozen, trainable = method.init(key, params)
        flat = tree.flatten(params)
        moved = [path for path, leaf in tree.flatten(frozen).items() if isinstance(leaf, Moved)]
        copies = {path: jnp.copy(flat[path]) for path in moved}
        return (frozen if not moved else {**frozen, REFERENCE: tree.unflatten(copies)}), trainable

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        return method.attach(_without(frozen), trainable, key=key)

    return method._replace(init=init, attach=attach)


def reference(frozen: Params, params: Params | None = None) -> Params:
    """Return the parameters of the reference: the frozen tree, with its copies in the holes of what is trained.

    Args:
      frozen: of an `anchored` method, or of any if `params` are given.
      params: the model that the method began with, which fill the holes of a frozen tree without copies; its branches alone are returned.

    Raises:
      ValueError: there is a hole and nothing to fill it with: the method was not `anchored`.
    """
    copies, model = tree.flatten(frozen.get(REFERENCE, {}) if params is None else params), _without(frozen)
    model = model if params is None else {name: model[name] for name in params}
    holes = [path for path, leaf in tree.flatten(model).items() if isinstance(leaf, Moved)]
    if missing := [path for path in holes if path not in copies]:
        raise ValueError(f"reference: {missing[0]!r} is trained and there is no copy of it: wrap the method in peft.anchored(…).")
    return tree.replace(model, {path: copies[path] for path in holes})


def _without(frozen: Params) -> Params:
    return {name: branch for name, branch in frozen.items() if name != REFERENCE}
