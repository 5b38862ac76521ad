"""Onto the mesh: host arrays, files and fresh values, shard by shard, so that no device ever holds a whole array that a rule splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding

from ftjax import tree
from ftjax.sharding.rules import RULES, Rules, placed, shardings, state_shardings
from ftjax.types import TrainState


def abstract(shapes: Any, where: Any) -> Any:
    """Return `jax.ShapeDtypeStruct`s with these shardings: what orbax restores into and `jit(f).lower` takes."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, where)


def place(host: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Put a tree of host arrays on the mesh; each device gets its shard, and no device ever holds a whole array that a rule splits.

    A leaf is a numpy array, or anything with `shape`, `dtype` and `read(index)` such as `ftjax.hf.lazy.LazyTensor`, of which a process
    reads the blocks of its own devices only.
    """
    where = [NamedSharding(mesh, row.spec) for row in placed(host, mesh, rules)]
    arrays = [_put(leaf, sharding) for leaf, sharding in zip(jax.tree.leaves(host), where, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(host), arrays)


def placement(mesh: Mesh, rules: Rules = RULES) -> Callable[[str, Any], jax.Array]:
    """Return `place` for one leaf, `(path, tensor) -> array`: what `hf.load(…, place=…)` takes."""
    return lambda path, tensor: tree.flatten(place(tree.unflatten({path: tensor}), mesh, rules))[path]


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Make the array from its blocks; devices that hold the same block share one reading of it."""
    in_memory = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
    read = (lambda index: np.asarray(leaf[index])) if in_memory else leaf.read
    blocks: dict[str, np.ndarray] = {}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        name = str(index)
        if name not in blocks:
            blocks[name] = read(index)
        return blocks[name]

    return jax.make_array_from_callback(leaf.shape, sharding, block)


def init_on_mesh(function: Callable[..., Any], *args: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Return `function(*args)` computed on the mesh, so that no result is ever whole on one device.

    For random weights (`model.init`), a method (`method.init`) and the training state (`init_state`, laid out by `state_shardings`). An
    argument that lies where it should and is returned as it came is not copied: the frozen tree shares the buffers of the parameters, and
    the state those of the trainable tree, which the first step then donates.
    """
    shapes = jax.eval_shape(function, *args)
    where = state_shardings(shapes, mesh, rules) if isinstance(shapes, TrainState) else shardings(shapes, mesh, rules)
    kept = _returned(function, args, jax.tree.leaves(where))
    fresh = [n for n, array in enumerate(kept) if array is None]

    def missing(*args: Any) -> list[jax.Array]:  # not all of it: jit copies an argument that it returns
        leaves = jax.tree.leaves(function(*args))
        return [leaves[n] for n in fresh]

    made = jax.jit(missing, out_shardings=[jax.tree.leaves(where)[n] for n in fresh])(*args)
    for n, array in zip(fresh, made, strict=True):
        kept[n] = array
    return jax.tree.unflatten(jax.tree.structure(shapes), kept)


def _returned(function: Callable[..., Any], args: tuple[Any, ...], where: list[NamedSharding]) -> list[jax.Array | None]:
    """Return for each output the argument that it is, if that one lies where the output is to lie."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    given = dict(zip(jaxpr.invars, jax.tree.leaves(args), strict=True))

    def kept(variable: Any, there: NamedSharding) -> jax.Array | None:
        array = given.get(variable) if isinstance(variable, Var) else None
        here = getattr(array, "sharding", None)
        return array if isinstance(here, NamedSharding) and here.is_equivalent_to(there, array.ndim) else None

    return [kept(variable, there) for variable, there in zip(jaxpr.outvars, where, strict=True)]
