"""What methods that ride on frozen leaves share: which leaves, a key for each, the trained tree, and joining the two again.

A method file brings its maths alone: `make`, the arrays that start a leaf, and a `Weight` made of them. An array that is neither trained
nor the model's (a random projection, the places of sparse entries) goes into the frozen tree under the method's name.
"""

from __future__ import annotations

import abc
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.shared import Shared
from ftjax.types import Params, Plan, Transform
from ftjax.weights import Leaf, Wrapper

Make = Callable[[jax.Array, str, tuple[int, ...]], dict[str, jax.Array]]
"""`(key, path, shape [..., i, o]) -> {field: array}`: what is trained of a leaf, in float32, as it starts."""
Freeze = Callable[[dict[str, tuple[int, ...]]], Params]
"""`{path: shape} -> arrays` that are not trained: at the root those of all leaves, at `path/field` those of one."""


class Added(Wrapper):
    """`materialize() == base + delta()`, the sum rounded once to the base's dtype. Abstract; `delta` and `push` are the method.

    A dense term is multiplied as the frozen matrix is, in the dtype of x: in float32 it would take several times as long where bfloat16
    has units of its own. A method whose term is thin pushes in float32, as LoRA does.
    """

    base: Leaf

    @abc.abstractmethod
    def delta(self) -> jax.Array:
        """Return the dense term, float32 `[..., i, o]`."""

    def push(self, x: jax.Array) -> jax.Array:
        """Return `x @ delta()`, `[..., i] -> [..., o]`, in the dtype of x or float32."""
        return weights.dot(x, self.delta())

    def pull(self, x: jax.Array) -> jax.Array:
        """Return `x @ delta()ᵀ`, `[..., o] -> [..., i]`, in the dtype of x or float32."""
        return weights.dot_transposed(x, self.delta())

    def rows(self, ids: jax.Array) -> jax.Array:
        """Return `delta()[ids]`, float32 `[...] -> [..., o]`."""
        return weights.embed(ids, self.delta())

    def materialize(self) -> jax.Array:
        return added(weights.materialize(self.base), self.delta())

    def dot(self, x: jax.Array) -> jax.Array:
        return added(weights.dot(x, self.base), self.push(x))

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return added(weights.dot_transposed(x, self.base), self.pull(x))

    def embed(self, ids: jax.Array) -> jax.Array:
        return added(weights.embed(ids, self.base), self.rows(ids))


def added(y: jax.Array, delta: jax.Array) -> jax.Array:
    """Return `y + delta`, summed in float32 and rounded once to the dtype of y."""
    return (y.astype(jnp.float32) + delta.astype(jnp.float32)).astype(y.dtype)


def riding(
    make: Make,
    leaf: Callable[..., Leaf],
    *,
    name: str,
    targets: tree.Filter,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    neutral: Mapping[str, float] | None = None,
    freeze: Freeze | None = None,
    options: Mapping[str, Any] | None = None,
) -> Transform:
    """Return the method that trains `make`'s arrays and puts `leaf(base, **arrays)` where a target was.

    Args:
      make: what a leaf starts from; it raises ValueError for a shape that does not suit it.
      leaf: a Weight of the base and of the arrays that `make` and `freeze` name.
      name: the key in the trainable tree, and in the frozen tree if there is `freeze`.
      targets: which matrices (see `ftjax.tree`).
      exclude: matrices to leave out among them.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      neutral: by field, the value that changes nothing, 0 where not listed: what other layers get.
      freeze: arrays that are not trained. Those at the root reach every leaf as `Shared`.
      options: plain data for the plan.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix.
    """

    def paths(params: Params) -> tuple[str, ...]:
        return tree.matches(params, targets, who=name, exclude=exclude)

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        flat, trained = tree.flatten(params), {}
        shapes = {path: check_matrix(name, path, flat[path].shape) for path in paths(params)}
        for path, shape in shapes.items():
            made = make(path_key(key, path), path, shape)
            trained |= {f"{path}/{field}": array for field, array in made.items()}
        frozen = params if freeze is None else {**params, name: freeze(shapes)}
        return frozen, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        if freeze is not None and name not in frozen:
            raise ValueError(f"{name}: the frozen tree has no {name!r} with what all leaves share; use the one that init returned.")
        extra = tree.flatten(frozen[name]) if freeze is not None else {}
        model = {path: value for path, value in frozen.items() if freeze is None or path != name}
        shared = {field: Shared(array) for field, array in extra.items() if "/" not in field}
        flat, arrays = tree.flatten(model), by_leaf(tree.flatten(trainable[name]))
        own = by_leaf({path: array for path, array in extra.items() if "/" in path})
        check_known(name, arrays, flat)
        return tree.replace(model, {path: leaf(flat[path], **fields, **own.get(path, {}), **shared) for path, fields in arrays.items()})

    def plan(params: Params) -> tuple[Plan, ...]:
        return (Plan(name, tree.describe(targets), paths(params), dict(options or {})),)

    transform = Transform(init, attach, plan)
    return transform if layers is None else on_layers(transform, layers, neutral=neutral)


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Return the key of a path: what a leaf starts from does not depend on which others are trained."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def check_known(name: str, paths: Iterable[str], flat: Mapping[str, Any]) -> None:
    """Refuse an adapter of a leaf that the model has not."""
    if unknown := sorted(set(paths) - set(flat)):
        near = tree.nearest(unknown[0], flat)
        raise ValueError(f"{name}: the adapter has {unknown[0]!r}, which this model has not; nearest: {near}.")


def by_leaf(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `{path of the leaf: {field: array}}` for a flat tree of `path/field`."""
    found: dict[str, dict[str, Any]] = {}
    for path, array in flat.items():
        leaf, field = path.rsplit("/", 1)
        found.setdefault(leaf, {})[field] = array
    return found


def check_matrix(name: str, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape if it is a matrix's, or a stack's of them."""
    if len(shape) < 2 or not path.endswith("kernel"):
        raise ValueError(f"{name}: {path!r} with shape {list(shape)} is not a matrix; target kernels, or train it with full().")
    return shape


def check_range(name: str, what: str, value: int, largest: int, path: str, shape: tuple[int, ...]) -> None:
    """Refuse a size that is not from 1 to `largest`."""
    if not 1 <= value <= largest:
        raise ValueError(f"{name}: {what} {value} does not fit {path!r} with shape {list(shape)}: expected 1 to {largest}.")


def check_rank(name: str, rank: int, path: str, shape: tuple[int, ...]) -> None:
    """Refuse a rank that is not from 1 to the smaller side of the matrix."""
    check_range(name, "rank", rank, min(shape[-2:]), path, shape)


def scale_of(name: str, rank: int, alpha: float | None) -> float:
    """Return alpha / rank; 1 without an alpha."""
    if rank < 1:
        raise ValueError(f"{name}: rank is from 1 to the smaller side of the matrix, not {rank}.")
    return 1.0 if alpha is None else alpha / rank


def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """Return U(-1/√fan, 1/√fan): PyTorch's Kaiming uniform with a = √5, the start of a `Linear`."""
    bound = 1 / math.sqrt(fan)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def as_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Return the vector with as many axes as `like`, to be multiplied into its last."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
