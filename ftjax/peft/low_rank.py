"""What the relatives of LoRA share: which matrices, of what rank and scale, with what dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.peft.riding import by_leaf, check_known, check_matrix, check_rank, path_key
from ftjax.types import Params, Plan
from ftjax.weights import Leaf


def scale(rank: int, alpha: float, options: Mapping[str, Any]) -> float:
    """Return alpha / rank, or alpha / √rank with the option `rslora`."""
    return alpha / (rank**0.5 if options["rslora"] else rank)


class Target(NamedTuple):
    """One matrix before training."""

    path: str
    leaf: Leaf
    rank: int
    key: jax.Array
    """Its own, from its path."""


class Joined(NamedTuple):
    """One matrix and what is trained on it."""

    path: str
    base: Leaf
    fields: dict[str, jax.Array]
    scale: jax.Array
    """`[...]`, one for each stacked layer."""
    dropout: tuple[jax.Array | None, float]
    """A key for each stacked layer and the probability; `(None, 0.0)` where nothing is dropped."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The common arguments (see `ftjax.peft.lora`) and what they say of a tree."""

    kind: str
    """The entry of `peft.METHODS`."""
    name: str
    targets: tree.Filter
    rank: int
    alpha: float | None
    rslora: bool
    dropout: float
    exclude: tree.Filter | None
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self.name}: dropout is a probability in [0, 1), not {self.dropout}.")

    def rank_of(self, path: str) -> int:
        """Return the rank at a path: the first pattern that matches, else the common one."""
        return _lookup(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Return the numerator of the scale at a path, by default the rank."""
        return _lookup(self.alpha_pattern, path, self.rank_of(path) if self.alpha is None else self.alpha)

    def scales(self, path: str, shape: tuple[int, ...]) -> jax.Array:
        """Return the scale of each stacked layer of a leaf of this shape."""
        return jnp.full(shape[:-2], scale(self.rank_of(path), self.alpha_of(path), {"rslora": self.rslora}), jnp.float32)

    def paths(self, params: Params) -> tuple[str, ...]:
        """Return the targets; a pattern that matches none of them is an error."""
        found = tree.matches(params, self.targets, who=self.name, exclude=self.exclude)
        for pattern in (*(self.rank_pattern or ()), *(self.alpha_pattern or ())):
            if not any(_applies(pattern, path) for path in found):
                raise ValueError(f"{self.name}: pattern {pattern!r} matches none of the targets; nearest: {tree.nearest(pattern, found)}.")
        return found

    def matrices(self, key: jax.Array, params: Params) -> Iterator[Target]:
        """Yield the targets; one that is no matrix, or too small for its rank, is an error."""
        flat = tree.flatten(params)
        for path in self.paths(params):
            check_rank(self.name, self.rank_of(path), path, check_matrix(self.name, path, flat[path].shape))
            yield Target(path, flat[path], self.rank_of(path), path_key(key, path))

    def joined(self, frozen: Params, trainable: Params, *, key: jax.Array | None) -> Iterator[Joined]:
        """Yield each base with its trained fields; a field of a leaf that the model has not is an error."""
        flat, fields = tree.flatten(frozen), by_leaf(tree.flatten(trainable[self.name]))
        check_known(self.name, fields, flat)
        for path, values in fields.items():
            shape = flat[path].shape
            yield Joined(path, flat[path], values, self.scales(path, shape), self._dropout(key, path, shape[:-2]))

    def plan(self, params: Params) -> tuple[Plan, ...]:
        """Return one row for each pair of rank and alpha."""
        groups: dict[tuple[int, float], list[str]] = {}
        for path in self.paths(params):
            groups.setdefault((self.rank_of(path), self.alpha_of(path)), []).append(path)
        shown, common = tree.describe(self.targets), {"rslora": self.rslora, "dropout": self.dropout}
        return tuple(Plan(self.name, shown, tuple(ps), {"rank": r, "alpha": a, **common}, self.kind) for (r, a), ps in groups.items())

    def _dropout(self, key: jax.Array | None, path: str, layers: tuple[int, ...]) -> tuple[jax.Array | None, float]:
        if key is None or not self.dropout:
            return None, 0.0
        return (jax.random.split(path_key(key, path), layers) if layers else key), self.dropout


def _applies(pattern: str, path: str) -> bool:
    return tree.predicate(pattern)(path) or tree.predicate([pattern])(path)


def _lookup(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    return next((value for pattern, value in (patterns or {}).items() if _applies(pattern, path)), default)
