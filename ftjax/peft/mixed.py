"""Adapters mixed in one batch: each row has its own, or none, over one base that all rows are multiplied by together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree, weights
from ftjax.peft.lora import LowRankWeight
from ftjax.peft.shared import Shared
from ftjax.types import Params, pytree
from ftjax.weights import Leaf, Weight, Wrapper

NONE = -1
"""The row index of no adapter."""


@pytree
class RowWise(Weight):
    """A weight of its own for each row of a batch: the base with every one of `kinds` on it, each with the arrays of adapter `rows[n]`.

    An adapter is of one kind, and in the stacks of the other kinds it has what changes nothing. So has every stack at its end, which is
    where -1, no adapter, points.
    """

    base: Leaf
    """`[..., i, o]`."""
    kinds: tuple[Wrapper, ...]
    """Weights whose base is None; their arrays `[..., n + 1, *]` are those of n adapters, stacked."""
    rows: jax.Array | None = None
    """int32 `[..., b]`: the adapter of each row, the same for all layers; None before `assign_rows`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def count(self) -> int:
        """How many adapters there are to choose from."""
        return jax.tree.leaves(self.kinds)[0].shape[len(self.shape) - 2] - 1

    def materialize(self) -> jax.Array:
        raise ValueError("mixed: each row has a weight of its own, so there is no dense one; merge the adapters one by one.")

    def dot(self, x: jax.Array) -> jax.Array:
        return self._by_row(weights.dot, x)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return self._by_row(weights.dot_transposed, x)

    def embed(self, ids: jax.Array) -> jax.Array:
        return self._by_row(weights.embed, ids)

    def dots(self, x: jax.Array, ws: Sequence[Any]) -> tuple[jax.Array, ...]:
        mixed = [w for w in ws if isinstance(w, RowWise)]
        products = iter(
            jax.vmap(lambda kinds, x: weights.dots(x, [_onto(w.base, *own) for w, own in zip(mixed, kinds, strict=True)]))(
                [w._chosen(x) for w in mixed], x
            )
        )
        return tuple(next(products) if isinstance(w, RowWise) else weights.dot(x, w) for w in ws)

    def _by_row(self, product: Callable[[jax.Array, Leaf], jax.Array], x: jax.Array) -> jax.Array:
        # The base has no axis of rows, so its part of the mapped product is one product for the whole batch.
        return jax.vmap(lambda kinds, x: product(x, _onto(self.base, *kinds)))(self._chosen(x), x)

    def _chosen(self, x: jax.Array) -> tuple[Wrapper, ...]:
        """Return the kinds with arrays `[b, *]`: those of the adapter of each row of x."""
        if self.rows is None:
            raise ValueError("mixed: no row has an adapter yet; call assign_rows(params, rows) first.")
        if x.shape[0] != self.rows.shape[-1]:
            raise ValueError(
                f"mixed: adapters were assigned to {self.rows.shape[-1]} rows, and the batch {list(x.shape)} has {x.shape[0]}."
            )
        return jax.tree.map(lambda stacked: stacked[self.rows], self.kinds)


def mixed(params: Params, adapters: Mapping[str, Params], rows: Sequence[str | None]) -> Params:
    """Return parameters with which each row of a batch is computed with its own adapter, or with none.

    y[n] = x[n] (W + Δ_k) with k = rows[n]: x W once for the whole batch, and thin products for each row (S-LoRA, Sheng et al., 2023,
    arXiv 2311.03285). Any method that rides on leaves may be mixed with any other. Rows are those of the batch `[b, t]`; pairs and groups
    `[*b, t]` are counted flat. The gradient of an adapter comes from its own rows alone.

    Args:
      params: the model's.
      adapters: `{name: what method.attach(frozen, trainable) returned}`, on these very arrays, without a key.
      rows: for each row the name of its adapter, or None.

    Raises:
      ValueError: there is no adapter of a name, or one cannot differ from row to row (see `stack_adapters`).

    Example:
      >>> from ftjax import peft
      >>> params, method = {"q_proj": {"kernel": jnp.ones((4, 6))}}, peft.lora(["q_proj"], rank=2, init="a_zero")
      >>> frozen, trainable = method.init(jax.random.key(0), params)
      >>> adapters = {"one": method.attach(frozen, trainable), "two": method.attach(frozen, jax.tree.map(jnp.ones_like, trainable))}
      >>> both = mixed(params, adapters, ["two", None, "one"])
      >>> weights.dot(jnp.ones((3, 4)), both["q_proj"]["kernel"])[:, 0].tolist()
      [12.0, 4.0, 4.0]
    """
    return assign_rows(stack_adapters(params, adapters), row_indices(rows, adapters))


def stack_adapters(params: Params, adapters: Mapping[str, Params], *, rank: int | None = None) -> Params:
    """Return parameters with the arrays of all adapters side by side, to which `assign_rows` then gives the rows of each batch.

    Low-rank factors are filled up with zeros to the largest rank at their place. To put another adapter in the place of one is to stack
    again: while shapes, methods and targets stay, nothing that was compiled is compiled again.

    Args:
      params: the model's.
      adapters: `{name: what method.attach(frozen, trainable) returned}`, on these very arrays, without a key.
      rank: fill up to this one at least, so that later adapters of up to this rank have the same shapes.

    Raises:
      ValueError: an adapter changes more than leaves it rides on (it was trained in full, or adds to the layers), rides on another base, or
        was attached with a key.
    """
    flat, leaves, shared = tree.flatten(params), {}, {}
    flats = {name: tree.flatten(adapted) for name, adapted in adapters.items()}
    for name, adapted in flats.items():
        if extra := sorted(adapted.keys() ^ flat.keys()):
            raise ValueError(f"mixed: adapter {name!r} has or lacks {extra[0]!r}; only methods that ride on leaves differ from row to row.")
    for path, base in flat.items():
        found = [adapted[path] for adapted in flats.values()]
        if any(leaf is not base for leaf in found):
            for name, leaf in zip(flats, found, strict=True):
                _check(leaf, base, f"adapter {name!r} at {path!r}")
            leaves[path] = RowWise(base, _stacked([_sharing(leaf, base, shared) for leaf in found], base, rank))
    return tree.replace(params, leaves)


def assign_rows(params: Params, rows: Any) -> Params:
    """Return stacked adapters with an adapter for each row of the next batch.

    Args:
      params: what `stack_adapters` returned, or this function for another batch.
      rows: int `[b]`, the places of adapters in the order in which they were stacked, -1 for none; an array inside `jit`.
    """
    rows = jnp.asarray(rows, jnp.int32).reshape(-1)
    mixed = {path: leaf for path, leaf in tree.flatten(params).items() if isinstance(leaf, RowWise)}
    given = {path: jnp.broadcast_to(rows, (*leaf.shape[:-2], rows.shape[0])) for path, leaf in mixed.items()}
    return tree.replace(params, {path: dataclasses.replace(leaf, rows=given[path]) for path, leaf in mixed.items()})


def row_indices(names: Iterable[str | None], adapters: Iterable[str]) -> list[int]:
    """Return the place of each name among the adapters, -1 for None; an unknown name is a ValueError."""
    known = {name: at for at, name in enumerate(adapters)}
    names = list(names)
    if unknown := [name for name in names if name is not None and name not in known]:
        raise ValueError(f"mixed: there is no adapter {unknown[0]!r}; nearest: {tree.nearest(str(unknown[0]), known)}.")
    return [NONE if name is None else known[name] for name in names]


def _onto(base: Leaf, *kinds: Wrapper | None) -> Leaf:
    """Return the base with weights on it, each of which may carry others."""
    for kind in kinds:
        base = base if kind is None else dataclasses.replace(kind, base=_onto(base, kind.base))
    return base


def _check(leaf: Leaf, base: Leaf, where: str) -> None:
    if leaf is base:
        return
    if not isinstance(leaf, Wrapper):
        raise ValueError(f"mixed: {where} is no weight that rides on the model's own; it was trained in full, or for other parameters.")
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(dataclasses.replace(leaf, base=None))):
        raise ValueError(f"mixed: {where} holds a key, so dropout or noise would act: attach(frozen, trainable) without a key.")
    _check(leaf.base, base, where)


def _stacked(leaves: Sequence[Leaf], base: Leaf, rank: int | None) -> tuple[Wrapper, ...]:
    """Return a weight without base for each kind among the leaves, with the arrays of all of them and of none."""
    rank = max([rank or 0, *(low.a.shape[-1] for leaf in leaves for low in _parts(leaf, base) if isinstance(low, LowRankWeight))])
    filled = [_filled(leaf, base, rank) for leaf in leaves]
    kinds: dict[Any, Wrapper] = {}
    for leaf in filled:
        if leaf is not base:
            kinds.setdefault(_kind(leaf, base), leaf)
    axis = len(base.shape) - 2
    stacks = []
    for kind, first in kinds.items():
        nothing = _neutral(first, base)
        members = [leaf if leaf is not base and _kind(leaf, base) == kind else nothing for leaf in filled]
        stacks.append(jax.tree.map(lambda *xs: jnp.stack(xs, axis), *(_off(leaf, base) for leaf in (*members, nothing))))
    return tuple(stacks)


def _parts(leaf: Leaf, base: Leaf) -> list[Wrapper]:
    """Return the weights that lie on the base, the outermost first."""
    return [] if leaf is base else [leaf, *_parts(leaf.base, base)]


def _off(leaf: Leaf, base: Leaf) -> Wrapper | None:
    """Return what lies on the base."""
    return None if leaf is base else dataclasses.replace(leaf, base=_off(leaf.base, base))


def _kind(leaf: Leaf, base: Leaf) -> Any:
    """Return what two leaves must have in common to be stacked."""
    arrays, structure = jax.tree.flatten(_off(leaf, base))
    return structure, tuple((x.shape, x.dtype) for x in arrays)


def _sharing(leaf: Leaf, base: Leaf, known: dict[int, Shared]) -> Leaf:
    """Return the leaf with the first of all arrays that are equal to one that it shares: adapters of two files then are of one kind."""
    if leaf is base:
        return base
    fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    shared = {name: _first(value, known) for name, value in fields.items() if isinstance(value, Shared)}
    return dataclasses.replace(leaf, base=_sharing(leaf.base, base, known), **shared)


def _first(shared: Shared, known: dict[int, Shared]) -> Shared:
    """Return what stands for this array, which is looked at once; inside `jit` each stands for itself."""
    x = shared.array
    if isinstance(x, jax.core.Tracer):
        return shared
    if id(x) not in known:
        same = (other for other in known.values() if other.array.shape == x.shape and np.array_equal(other.array, x))
        known[id(x)] = next(same, shared)
    return known[id(x)]


def _neutral(leaf: Leaf, base: Leaf) -> Leaf:
    return base if leaf is base else dataclasses.replace(leaf, base=_neutral(leaf.base, base)).neutral()


def _filled(leaf: Leaf, base: Leaf, rank: int) -> Leaf:
    """Return the leaf with zeros in its low-rank factors up to a rank."""
    if leaf is base:
        return base
    leaf = dataclasses.replace(leaf, base=_filled(leaf.base, base, rank))
    if not isinstance(leaf, LowRankWeight):
        return leaf
    missing, stack = rank - leaf.a.shape[-1], [(0, 0)] * (leaf.a.ndim - 2)
    a, b = jnp.pad(leaf.a, [*stack, (0, 0), (0, missing)]), jnp.pad(leaf.b, [*stack, (0, missing), (0, 0)])
    return dataclasses.replace(leaf, a=a, b=b)
