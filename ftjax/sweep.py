"""Many runs as one program: the training step of one member, mapped over members that share the frozen model.

A member is a run with numbers of its own: a seed, a learning rate, a rank. What it trains, its optimiser's state and its numbers have a
first axis `[n, ...]`; the model and the batch have none. So a product with a frozen matrix stays one product, over the tokens of all
members, and the matrix is there once.

A number in which members differ is traced: a member's method and optimiser are built of it inside the step, by the functions that build
those of a run alone. A tree with a smaller rank is padded with zeros to the largest: columns of A and rows of B that are zero add nothing,
and get no gradient but zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import train
from ftjax.train import Score
from ftjax.types import Batch, LossFn, Metrics, Params, TrainState, Transform, pytree

Numbers = dict[str, jax.Array]
"""`{name: [n]}`, and inside the step `{name: []}`: what members differ in, beside their keys."""
Method = Callable[[Numbers], Transform]
Optimizer = Callable[[Numbers], optax.GradientTransformation]


class Frozen(NamedTuple):
    """What no step changes."""

    model: Params
    """The frozen model, which all share."""
    own: Params
    """`{method: tree of [n, ...]}`: what methods keep in the frozen tree for themselves."""
    numbers: Numbers


_AXES = Frozen(model=None, own=0, numbers=0)


@pytree
class SweepState:
    """All that a step changes, of all members."""

    members: TrainState
    """Every leaf is `[n, ...]`."""
    active: jax.Array
    """bool `[n]`: the others stay as they are."""
    best: Params
    """The trainable tree of each as `remember` was last told to keep it."""


Step = Callable[[SweepState, Frozen, Batch], tuple[SweepState, Metrics]]


def init(methods: Sequence[Transform], keys: jax.Array, params: Params) -> tuple[Params, Params]:
    """Return what each member keeps in the frozen tree for itself, and its trainable tree, stacked.

    Members that share a method start as one mapped program, so what is compiled grows with the methods that differ.

    Args:
      methods: of each member, as it would be alone; the same object where they do not differ.
      keys: `[n]`.
      params: the model.

    Raises:
      ValueError: the members' trees have different leaves.
    """
    started: dict[int, tuple[Params, Params]] = {}
    for method in dict.fromkeys(methods):
        indices = [n for n, one in enumerate(methods) if one == method]
        together = jax.vmap(partial(_start, method, params))(keys[np.array(indices)])
        started |= {n: jax.tree.map(lambda x, place=place: x[place], together) for place, n in enumerate(indices)}
    own, trainable = zip(*(started[n] for n in range(len(methods))), strict=True)
    return stack(own), stack(trainable)


def _start(method: Transform, params: Params, key: jax.Array) -> tuple[Params, Params]:
    frozen, trainable = method.init(key, params)
    return {name: branch for name, branch in frozen.items() if name not in params}, trainable


def init_state(keys: jax.Array, frozen: Frozen, trainable: Params, method: Method, optimizer: Optimizer) -> SweepState:
    """Return the state before the first step; `keys` `[n]` seed dropout and noise."""

    def one(key: jax.Array, trainable: Params, numbers: Numbers) -> TrainState:
        return train.init_state(key, trainable, method(numbers), optimizer(numbers))

    members = jax.vmap(one)(keys, trainable, frozen.numbers)
    return SweepState(members, jnp.ones(keys.shape, bool), jax.tree.map(jnp.copy, trainable))


def make_sweep_step(
    score: Score,
    method: Method,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    out_shardings: Any = None,
    complete: train.Complete | None = None,
    baseline: train.Baseline | None = None,
) -> Step:
    """Return the jitted `step(state, frozen, batch) -> (state, metrics)`: for each member the step of `train.make_train_step`.

    All members see the same batch. One that is not active computes with the others and stays as it is; one whose step is not finite does
    not disturb them.

    Args:
      score: `(params, batch) -> Scores`.
      method: the method of a member from its numbers; they may enter arithmetic only, and no shape.
      loss_fn: the objective.
      optimizer: the optimiser of a member from its numbers, likewise.
      accumulation: as in `train.make_train_step`.
      out_shardings: of `(state, metrics)` on a mesh.
      complete: as in `train.make_train_step`; what does not depend on a member is computed once for all.
      baseline: likewise.

    Returns:
      The step. It donates the state. Totals and weights of the metrics are `[n]`.
    """

    def one(state: TrainState, active: jax.Array, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        options = {"accumulation": accumulation, "complete": complete, "baseline": baseline}
        step = train.make_train_step(score, method(frozen.numbers), loss_fn, optimizer(frozen.numbers), **options)
        new, metrics = step(state, {**frozen.model, **frozen.own}, batch)
        return _where(active, new, state), metrics

    def step(state: SweepState, frozen: Frozen, batch: Batch) -> tuple[SweepState, Metrics]:
        members, metrics = jax.vmap(one, in_axes=(0, 0, _AXES, None))(state.members, state.active, frozen, batch)
        return SweepState(members, state.active, state.best), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def make_sweep_eval_step(
    score: Score, method: Method, loss_fn: LossFn, *, complete: train.Complete | None = None, baseline: train.Baseline | None = None
) -> Callable[[Params, Frozen, Batch], Metrics]:
    """Return the jitted `evaluate(trainable [n, ...], frozen, batch) -> metrics [n]`, with dropout and noise off."""

    def one(trainable: Params, frozen: Frozen, batch: Batch) -> Metrics:
        evaluate = train.make_eval_step(score, method(frozen.numbers), loss_fn, complete=complete, baseline=baseline)
        return evaluate(trainable, {**frozen.model, **frozen.own}, batch)

    return jax.jit(jax.vmap(one, in_axes=(0, _AXES, None)))


def remember(state: SweepState, better: jax.Array, active: jax.Array) -> SweepState:
    """Return the state in which the members that are `better` `[n]` are kept as their best, and only those that are `active` go on."""
    return SweepState(state.members, active, jax.vmap(_where)(better, state.members.trainable, state.best))


def stack(trees: Sequence[Any]) -> Any:
    """Return the tree of `[n, ...]`, each leaf padded with zeros at the end of its axes to the largest.

    Raises:
      ValueError: the trees have different leaves.
    """
    structures = [jax.tree.structure(tree) for tree in trees]
    if odd := [n for n, structure in enumerate(structures) if structure != structures[0]]:
        raise ValueError(f"sweep: member {odd[0]} has other leaves than member 0 and cannot be trained beside it.")

    def join(*leaves: jax.Array) -> jax.Array:
        shape = np.max([leaf.shape for leaf in leaves], axis=0)
        return jnp.stack([jnp.pad(leaf, [(0, most - size) for most, size in zip(shape, leaf.shape, strict=True)]) for leaf in leaves])

    return jax.tree.map(join, *trees)


def member(stacked: Any, index: int, like: Any) -> Any:
    """Return the tree of one member, cut to the shapes of `like`: the inverse of `stack`."""
    return jax.tree.map(lambda x, leaf: x[index][tuple(slice(size) for size in leaf.shape)], stacked, like)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
