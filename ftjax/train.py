"""The training step: the one place where a model, a method and a loss meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.types import Batch, LossFn, Mean, Metrics, Params, Scores, TrainState, Transform

Score = Callable[[Params, Batch], Scores]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def init_state(key: jax.Array, trainable: Params, method: Transform, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step: of the same `method` and `optimizer` as the step's.

    `key` seeds dropout and noise; it is copied, for a step donates the state.
    """
    if not tree.size(trainable):
        raise ValueError("init_state: nothing is trainable; choose a method that trains something, such as lora or full.")
    return TrainState(jnp.zeros((), jnp.int32), jnp.copy(key), trainable, method.optimizer(optimizer).init(trainable))


def make_train_step(
    score: Score,
    method: Transform,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    state_sharding: Any = None,
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

    Returns:
      The step. It donates the state and keeps `frozen`. The metrics are `Mean`s: `loss`, the loss's own, the method's own,
      `grad_norm` (before clipping), `update_norm`, `tokens` (supervised, the total is what counts) and `skipped`.
    """
    rule = method.optimizer(optimizer)

    def objective(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        mean, metrics = loss_fn(score(method.attach(frozen, trainable, key=key), batch), batch)
        return mean.total, {"loss": mean, **metrics}

    def gradient(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        return jax.grad(objective, has_aux=True)(trainable, frozen, batch, key)

    def accumulate(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        if accumulation == 1:
            return gradient(trainable, frozen, batch, key)
        batches = jax.tree.map(lambda x: _split(x, accumulation), batch)
        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(gradient, trainable, frozen, first, key)

        def add(total, item):
            index, micro = item
            return jax.tree.map(jnp.add, total, gradient(trainable, frozen, micro, jax.random.fold_in(key, index))), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation), batches))[0]

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = accumulate(state.trainable, frozen, batch, key)
        grads = jax.tree.map(lambda g: g / metrics["loss"].weight, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes int32 step counts; ftjax itself runs under strict promotion in tests
            updates, opt_state = rule.update(grads, state.opt_state, state.trainable)
        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(update_norm) & jnp.isfinite(metrics["loss"].total)
        trainable = _select(finite, optax.apply_updates(state.trainable, updates), state.trainable)
        opt_state = _select(finite, opt_state, state.opt_state)
        one = jnp.ones((), jnp.float32)
        metrics |= {
            "grad_norm": Mean(grad_norm, one),
            "update_norm": Mean(update_norm, one),
            "tokens": Mean(jnp.sum(batch.loss_mask), one),
            "skipped": Mean(1.0 - finite.astype(jnp.float32), one),
        } | {name: Mean(value, one) for name, value in method.metrics(trainable).items()}
        return TrainState(state.step + 1, state.key, trainable, opt_state), metrics

    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None))


def make_eval_step(score: Score, method: Transform, loss_fn: LossFn) -> Callable[[Params, Params, Batch], Metrics]:
    """Return the jitted `evaluate(trainable, frozen, batch) -> metrics`, with dropout and noise off."""

    def evaluate(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        mean, metrics = loss_fn(score(method.attach(frozen, trainable), batch), batch)
        return {"loss": mean, **metrics}

    return jax.jit(evaluate)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` or `old`; a multiplication by zero would keep a NaN."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """Reshape rows `[b, ...]` to `[parts, b / parts, ...]`, taking every parts-th row so that rows stay on their device."""
    if x.shape[0] % parts:
        raise ValueError(f"accumulation: a batch of {x.shape[0]} rows cannot be split into {parts} micro-batches.")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
