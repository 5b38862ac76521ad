"""The training step: the one place where a model, a method and a loss meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.types import Batch, LossFn, Mean, Metrics, Params, Scores, TrainState, Transform

Score = Callable[[Params, Batch], Scores]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
Remembered = Mapping[str, Any]
_NOTHING: Remembered = {}
Complete = Callable[[Params, Batch], Batch]
"""`(frozen, batch) -> batch`: what is known of a micro-batch before its gradient, such as the reference's log-probabilities."""


class Baseline(NamedTuple):
    """A number of the whole step that the objective reads and no micro-batch knows: what KTO compares with, NPO's share of rows to keep."""

    measure: Callable[[Params, Params, Batch], Mean]
    """`(params, frozen, batch) -> Mean` of a micro-batch, from the policy as it is before the step."""
    write: Callable[[Batch, Mean], Batch]
    """Put the quotient over the whole step into a batch."""


class Carried(NamedTuple):
    """Something that an objective remembers from one step to the next: a running mean (BCO), a reference that follows (TR-DPO)."""

    init: Callable[[Params], Any]
    """`init(trainable) -> carried`, arrays of its own, before the first step."""
    write: Callable[[Any, Params, Batch], Batch]
    """`write(carried, frozen, batch) -> batch`: into a micro-batch, before anything else is."""
    update: Callable[[Any, jax.Array, Params, Metrics], Any]
    """`update(carried, steps done, trainable, metrics) -> carried`, after a step; one that is not finite changes nothing here either."""


def init_state(
    key: jax.Array,
    trainable: Params,
    method: Transform,
    optimizer: optax.GradientTransformation,
    *,
    carried: Mapping[str, Carried] = {},
) -> TrainState:
    """Return the state before the first step: of the same `method`, `optimizer` and `carried` as the step's.

    `key` seeds dropout and noise; it is copied, for a step donates the state.
    """
    if not tree.size(trainable):
        raise ValueError("init_state: nothing is trainable; choose a method that trains something, such as lora or full.")
    remembered = {name: one.init(trainable) for name, one in carried.items()}
    return TrainState(jnp.zeros((), jnp.int32), jnp.copy(key), trainable, method.optimizer(optimizer).init(trainable), remembered)


def make_train_step(
    score: Score,
    method: Transform,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    state_sharding: Any = None,
    complete: Complete | None = None,
    baseline: Baseline | None = None,
    carried: Mapping[str, Carried] = {},
) -> Step:
    """Return the jitted `step(state, frozen, batch) -> (state, metrics)`.

    The gradient is that of Σ total / Σ weight over the whole batch: micro-batches and devices add totals and weights, and the quotient is
    taken once. A step whose loss, gradient or update is not finite changes nothing but the step count, and says so in `skipped`.

    Args:
      score: `(params, batch) -> Scores`, e.g. `partial(scoring.score, model)`.
      method: how `frozen` and `trainable` become `params`, and what it does to the optimiser.
      loss_fn: the objective.
      optimizer: an optax transformation over the trainable tree.
      accumulation: into how many micro-batches, one after the other, the rows of a batch are split; must divide them.
      state_sharding: shardings of the state on a mesh, so that it leaves the step as it came.
      complete: what is written into each micro-batch first. For an objective with a reference, and a forward pass more:
        `lambda frozen, batch: losses.with_reference(batch, score(frozen, batch))`.
      baseline: see `Baseline`: a pass over the whole batch before the first gradient.
      carried: see `Carried`, by names of their own.

    Returns:
      The step. It donates the state and keeps `frozen`. The metrics are `Mean`s: `loss`, the loss's own, the method's own,
      `grad_norm` (before clipping), `update_norm`, `tokens` (supervised, the total is what counts) and `skipped`.
    """
    rule = method.optimizer(optimizer)

    def objective(trainable: Params, frozen: Params, batch: Batch, key: jax.Array, remembered: Remembered):
        batch = _written(carried, remembered, frozen, batch)
        batch = complete(frozen, batch) if complete else batch
        mean, metrics = loss_fn(score(method.attach(frozen, trainable, key=key), batch), batch)
        return mean.total, {"loss": mean, **metrics}

    def accumulate(trainable: Params, frozen: Params, batch: Batch, key: jax.Array, remembered: Remembered) -> tuple[Params, Metrics]:
        gradient = jax.grad(objective, has_aux=True)
        if accumulation == 1:
            return gradient(trainable, frozen, batch, key, remembered)
        return _sum_over(
            lambda index, micro: gradient(trainable, frozen, micro, jax.random.fold_in(key, index), remembered),
            _micro_batches(batch, accumulation),
        )

    def with_baseline(trainable: Params, frozen: Params, batch: Batch, remembered: Remembered) -> Batch:
        params = method.attach(frozen, jax.lax.stop_gradient(trainable))

        def measure(index: jax.Array, micro: Batch) -> Mean:
            return baseline.measure(params, frozen, _written(carried, remembered, frozen, micro))

        return baseline.write(batch, _sum_over(measure, _micro_batches(batch, accumulation)))

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        batch = with_baseline(state.trainable, frozen, batch, state.carried) if baseline else batch
        grads, metrics = accumulate(state.trainable, frozen, batch, key, state.carried)
        grads = jax.tree.map(lambda g: g / metrics["loss"].weight, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes int32 step counts; ftjax itself runs under strict promotion in tests
            updates, opt_state = rule.update(grads, state.opt_state, state.trainable)
        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(update_norm) & jnp.isfinite(metrics["loss"].total)
        trainable = _select(finite, optax.apply_updates(state.trainable, updates), state.trainable)
        opt_state = _select(finite, opt_state, state.opt_state)
        done = state.step + 1
        remembered = {name: one.update(state.carried[name], done, trainable, metrics) for name, one in carried.items()}
        remembered = _select(finite, remembered, dict(state.carried))
        one = jnp.ones((), jnp.float32)
        metrics |= {
            "grad_norm": Mean(grad_norm, one),
            "update_norm": Mean(update_norm, one),
            "tokens": Mean(jnp.sum(batch.loss_mask), one),
            "skipped": Mean(1.0 - finite.astype(jnp.float32), one),
        } | {name: Mean(value, one) for name, value in method.metrics(trainable).items()}
        return TrainState(done, state.key, trainable, opt_state, remembered), metrics

    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None))


def make_eval_step(
    score: Score,
    method: Transform,
    loss_fn: LossFn,
    *,
    complete: Complete | None = None,
    baseline: Baseline | None = None,
    carried: Mapping[str, Carried] = {},
) -> Callable[..., Metrics]:
    """Return the jitted `evaluate(trainable, frozen, batch, remembered={}) -> metrics`, with dropout and noise off.

    `complete`, `baseline` and `carried` are those of the step, and `remembered` is `TrainState.carried`; without it, what the objective
    knows is what it knows before the first step.
    """
    read = make_reading(score, loss_fn, complete=complete, baseline=baseline)

    def evaluate(trainable: Params, frozen: Params, batch: Batch, remembered: Remembered = _NOTHING) -> Metrics:
        batch = _written(carried, remembered, frozen, batch) if remembered else batch
        mean, metrics = read(method.attach(frozen, trainable), frozen, batch)
        return {"loss": mean, **metrics}

    return jax.jit(evaluate)


def make_reading(
    score: Score, loss_fn: LossFn, *, complete: Complete | None = None, baseline: Baseline | None = None
) -> Callable[[Params, Params, Batch], tuple[Mean, Metrics]]:
    """Return `(params, frozen, batch) -> (loss, metrics)`: the objective of a batch by itself, with what it compares with."""

    def read(params: Params, frozen: Params, batch: Batch) -> tuple[Mean, Metrics]:
        batch = baseline.write(batch, baseline.measure(params, frozen, batch)) if baseline else batch
        batch = complete(frozen, batch) if complete else batch
        return loss_fn(score(params, batch), batch)

    return read


def _written(carried: Mapping[str, Carried], remembered: Remembered, frozen: Params, batch: Batch) -> Batch:
    """Return the batch with what is carried."""
    for name, one in carried.items():
        batch = one.write(remembered[name], frozen, batch)
    return batch


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` or `old`; a multiplication by zero would keep a NaN."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _micro_batches(batch: Batch, parts: int) -> Batch:
    """Return the batch with an axis of micro-batches in front."""
    return jax.tree.map(lambda x: _split(x, parts), batch)


def _sum_over(function: Callable[[jax.Array, Batch], Any], batches: Batch) -> Any:
    """Return the sum of `function(index, micro-batch)`, one after the other."""
    count = batches.tokens.shape[0]
    first = jax.tree.map(lambda x: x[0], batches)
    if count == 1:
        return function(jnp.zeros((), jnp.int32), first)
    shapes = jax.eval_shape(function, jnp.zeros((), jnp.int32), first)

    def add(total: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*item)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(count), batches))[0]


def _split(x: jax.Array, parts: int) -> jax.Array:
    """Reshape rows `[b, ...]` to `[parts, b / parts, ...]`, taking every parts-th row so that rows stay on their device."""
    if x.shape[0] % parts:
        raise ValueError(f"accumulation: a batch of {x.shape[0]} rows cannot be split into {parts} micro-batches.")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
