"""Onto the mesh: host arrays, files and fresh values, shard by shard, so that no device ever holds a whole array that a rule splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
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
    read = leaf.read if hasattr(leaf, "read") else lambda index: np.asarray(leaf[index])
    blocks: dict[str, np.ndarray] = {}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        name = str(index)
        if name not in blocks:
            blocks[name] = read(index)
        return blocks[name]

    return jax.make_array_from_callback(leaf.shape, sharding, block)


def init_on_mesh(function: Callable[..., Any], *args: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Return `function(*args)` computed on the mesh, so that no result is ever whole on one device.

    For random weights (`model.init`), a method (`method.init`: leaves that it passes on untouched keep their buffers) and the training
    state (`partial(init_state, optimizer=…)`, laid out by `state_shardings`).
    """
    shapes = jax.eval_shape(function, *args)
    where = state_shardings(shapes, mesh, rules) if isinstance(shapes, TrainState) else shardings(shapes, mesh, rules)
    return jax.jit(function, out_shardings=where)(*args)
