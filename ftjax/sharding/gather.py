"""A model on a mesh: leaves that gather themselves over `fsdp` before they multiply, and say where their product lies.

Left to itself the compiler splits activations over `fsdp` too and moves all rows of a batch to every device. A `Sharded` leaf tells it
what is meant: one layer's weights are gathered inside the scan, used and dropped, rows stay where they are, and the units of a layer are
split over `tensor`. The models do not know; `on_mesh` wraps the leaves on the way in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax import tree, weights
from ftjax.sharding.mesh import ROWS
from ftjax.sharding.rules import RULES, Rules, divisible, fit, names, paths
from ftjax.types import Model, Params, pytree, static
from ftjax.weights import Leaf, Wrapper

Entries = tuple[Any, ...]
"""A spec with an entry for each axis of the stacked array; a slice of the array has the last of them."""


@pytree
class Sharded(Wrapper):
    """`materialize() == materialize(base)`, and lies as the base does; a product gathers the base over `fsdp` first."""

    base: Leaf
    mesh: Mesh = static()
    dense: Entries = static()
    """Where the dense array would lie: decides where products lie."""
    stored: tuple[Entries | None, ...] = static()
    """Where each array of `base` lies, in the order of `jax.tree.leaves`; None leaves it to the compiler."""

    def gathered(self) -> Leaf:
        """Return the base with all of it that is split over `fsdp` on every device."""
        leaves, structure = jax.tree.flatten(self.base)
        return jax.tree.unflatten(structure, [_gather(self.mesh, entries, x) for entries, x in zip(self.stored, leaves, strict=True)])

    def materialize(self) -> jax.Array:
        return weights.materialize(self.base)

    def dot(self, x: jax.Array) -> jax.Array:
        return self.dots(x, (self,))[0]

    def dots(self, x: jax.Array, ws: Sequence[Any]) -> tuple[jax.Array, ...]:
        return _forgetful(self.mesh, _dots)(x, tuple(ws))

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return _forgetful(self.mesh, lambda x, w: _rows(w.mesh, weights.dot_transposed(x, w.gathered()), w.dense[-2]))(x, self)

    def embed(self, ids: jax.Array) -> jax.Array:
        return _forgetful(self.mesh, lambda ids, w: _rows(w.mesh, weights.embed(ids, w.gathered())))(ids, self)


def on_mesh(model: Model, mesh: Mesh, rules: Rules = RULES) -> Model:
    """Return the model for parameters that lie on `mesh` by `rules`: the same function, and a compiler that knows where things go.

    The model must use its matrices through `ftjax.weights`, as all of `ftjax.models` do. The output head is gathered once, by `head`, and
    not for every chunk of logits. On one device it is the model as it came.
    """
    if mesh.size == 1:
        return model

    def apply(params: Params, tokens: jax.Array, **options: Any) -> tuple[jax.Array, Any]:
        hidden, cache = model.apply(leaves_on_mesh(params, mesh, rules), _rows(mesh, tokens), **options)
        return _rows(mesh, hidden), cache

    def head(params: Params) -> Params:
        return jax.tree.map(_once, model.head(leaves_on_mesh(params, mesh, rules)), is_leaf=lambda leaf: isinstance(leaf, Sharded))

    return model._replace(apply=apply, head=head)


def leaves_on_mesh(params: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """Return the leaves as a model on the mesh has them."""
    return tree.unflatten({path: _sharded(path, leaf, mesh, rules) for path, leaf in tree.flatten(params).items()})


def _sharded(path: str, leaf: Leaf, mesh: Mesh, rules: Rules) -> Leaf:
    """Wrap a leaf that is split; arrays of an attached weight that have no rule (a scale, a key) are left to the compiler."""

    def entries(path: str, shape: tuple[int, ...]) -> Entries | None:
        spec = tree.first_match(rules, path)
        if spec is None or len(spec) > len(shape):
            return None
        return (*fit(spec, shape, mesh)[0], *(None,) * (len(shape) - len(spec)))

    dense = entries(path, leaf.shape)
    if dense is None:
        raise ValueError(f"sharding: {path!r} {list(leaf.shape)} has no rule that fits; see sharding.RULES and sharding.REST.")
    around = tuple(map(_without_fsdp, dense))
    leaf = leaf.on_mesh(mesh, ROWS, around) if isinstance(leaf, weights.Weight) else leaf
    if all(mesh.shape[name] == 1 for entry in dense for name in names(entry)):
        return leaf
    inner = tuple(entries(f"{path}/{name}" if name else path, u) for (name, _), u in zip(paths(leaf), divisible(leaf), strict=True))
    return Sharded(leaf, mesh, around, inner)


def _once(leaf: Leaf) -> Leaf:
    """Return the leaf gathered already."""
    if not isinstance(leaf, Sharded):
        return leaf
    stored = tuple(entries and tuple(map(_without_fsdp, entries)) for entries in leaf.stored)
    return Sharded(leaf.gathered(), leaf.mesh, leaf.dense, stored)


def _dots(x: jax.Array, ws: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    ys = weights.dots(x, [w.gathered() if isinstance(w, Sharded) else w for w in ws])
    return tuple(_rows(w.mesh, y, w.dense[-1]) if isinstance(w, Sharded) else y for w, y in zip(ws, ys, strict=True))


def _forgetful(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Where `fsdp` splits anything, keep the shards for the backward pass and gather them again, instead of keeping what was gathered."""
    return jax.checkpoint(function, prevent_cse=False) if mesh.shape["fsdp"] > 1 else function


def _rows(mesh: Mesh, x: jax.Array, last: Any = None) -> jax.Array:
    """Split `[b, …, n]` by rows, and its last axis as `last` says."""
    spec = P(ROWS, *(None,) * (x.ndim - 2), last) if x.ndim > 1 else P(ROWS)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit(spec, x.shape, mesh)[0]))


def _gather(mesh: Mesh, entries: Entries | None, x: jax.Array) -> jax.Array:
    if entries is None:
        return x
    entries = entries[len(entries) - x.ndim :]
    whole = NamedSharding(mesh, P(*map(_without_fsdp, entries)))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.with_sharding_constraint(x, whole)
    return _gather_floats(whole, NamedSharding(mesh, P(*entries)), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_floats(whole: NamedSharding, stored: NamedSharding, x: jax.Array) -> jax.Array:
    """Gather; the gradient goes back into shards, where a plain constraint would leave it whole on every device."""
    del stored
    return jax.lax.with_sharding_constraint(x, whole)


_gather_floats.defvjp(
    lambda whole, stored, x: (_gather_floats(whole, stored, x), None),
    lambda whole, stored, residuals, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)


def _without_fsdp(entry: Any) -> Any:
    rest = tuple(name for name in names(entry) if name != "fsdp")
    return rest[0] if len(rest) == 1 else rest or None
