"""A method on some of the layers only: the others keep exactly what they had, get no gradient and take no memory in the state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.types import Params, Plan, Transform

Layers = Sequence[int] | slice | str
"""Indices (negative ones count from the end), a slice, `"first n"` or `"last n"`."""


def on_layers(transform: Transform, layers: Layers, *, neutral: Mapping[str, float] | None = None) -> Transform:
    """Return a method that rides on some of the stacked layers only.

    The trained arrays are `[n, ...]` for the n layers chosen, in ascending order, and so are their gradients and moments. `attach` widens
    them to `[L, ...]` with the value that changes nothing. The other layers still spend the time of an adapter, for one scanned program
    serves all of them.

    Args:
      transform: a method whose trained arrays are stacked like the leaf they ride on and named `path/field`: `lora` and all that are
        made by `riding`.
      layers: which (see `Layers`).
      neutral: by field, the value that changes nothing; 0 where not listed.

    Raises:
      ValueError: a target is not a stacked layer; there is no such layer; none is chosen.

    Example:
      >>> from ftjax import peft
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((4, 8, 8))}}}
      >>> frozen, trainable = on_layers(peft.lora(["q_proj"], rank=2), "last 1").init(jax.random.key(0), params)
      >>> trainable["lora"]["layers"]["q_proj"]["kernel"]["a"].shape
      (1, 8, 2)
    """
    values = dict(neutral or {})

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        frozen, trainable = transform.init(key, params)
        for name, branch in trainable.items():
            if tree.flatten(branch).keys() & tree.flatten(frozen.get(name, {})).keys():
                raise ValueError(f"layers: {name!r} keeps where it started for all layers; say which in its own argument `layers`.")
        return frozen, {
            name: _each(branch, params, lambda x, count, _: x[np.array(chosen(layers, count))]) for name, branch in trainable.items()
        }

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        def widen(x: jax.Array, count: int, field: str) -> jax.Array:
            whole = jnp.full((count, *x.shape[1:]), values.get(field, 0.0), x.dtype)
            return whole.at[np.array(chosen(layers, count))].set(x)

        names = {row.method for row in transform.plan(frozen)}
        wide = {name: _each(branch, frozen, widen) if name in names else branch for name, branch in trainable.items()}
        return transform.attach(frozen, wide, key=key)

    def plan(params: Params) -> tuple[Plan, ...]:
        rows = transform.plan(params)
        return tuple(row._replace(options={**row.options, "layers": chosen_of(layers, params, row.paths, row.method)}) for row in rows)

    return transform._replace(init=init, attach=attach, plan=plan)


def chosen(layers: Layers, count: int) -> tuple[int, ...]:
    """Return the indices of the chosen among `count` layers, ascending."""
    if isinstance(layers, str):
        found = re.fullmatch(r"(first|last) ([0-9]+)", layers)
        if not found or not 1 <= int(found[2]) <= count:
            raise ValueError(f"layers: expected indices, a slice, 'first n' or 'last n' with n from 1 to {count}, not {layers!r}.")
        layers = slice(int(found[2])) if found[1] == "first" else slice(count - int(found[2]), None)
    if isinstance(layers, slice):
        indices = range(count)[layers]
    else:
        if outside := [index for index in layers if not -count <= index < count]:
            raise ValueError(f"layers: there is no layer {outside[0]}; the model has {count}, from 0 to {count - 1}.")
        indices = [index % count for index in layers]
    if not indices:
        raise ValueError(f"layers: {layers!r} chooses none of {count} layers.")
    return tuple(sorted(set(indices)))


def _each(branch: Params, params: Params, function) -> Params:
    """Map `function(array, number of layers, field)` over the trained arrays `path/field`."""
    flat, out = tree.flatten(params), {}
    for path, array in tree.flatten(branch).items():
        leaf, field = path.rsplit("/", 1)
        if leaf not in flat:
            raise ValueError(f"layers: the adapter has {leaf!r}, which this model has not; nearest: {tree.nearest(leaf, flat)}.")
        out[path] = function(array, stacked(leaf, flat[leaf].shape, "layers"), field)
    return tree.unflatten(out)


def chosen_of(layers: Layers, params: Params, paths: Sequence[str], who: str) -> tuple[int, ...]:
    """Return the indices of the chosen layers of these leaves."""
    flat = tree.flatten(params)
    counts = {stacked(path, flat[path].shape, who) for path in paths}
    return tuple(sorted({index for count in counts for index in chosen(layers, count)}))


def stacked(path: str, shape: tuple[int, ...], who: str) -> int:
    """Return the number of layers of a leaf that is a stack of them."""
    if not path.startswith("layers/"):
        raise ValueError(f"{who}: {path!r} is not one of the stacked layers, so `layers` cannot choose among it; exclude it.")
    return shape[0]
