"""Log-probabilities of given tokens without ever holding the logits.

Glossary. A *chunk* is a slice of a few tokens from every row; the logits of one chunk are all that exists at a time. The *head* is the
part of the parameters that turns hidden states into logits.

Memory: one chunk of logits (float32) and, under a gradient, one array the size of `hidden`. Work: the logits are computed once. A token's
log-probability has the gradient g · (E[W | p] - W_target) in its hidden state, and only the scalar g is not known during the forward
pass; so the forward pass stores the rest, and the backward pass is a multiplication by g. This saves a third of the matmuls. Where the
head itself is trained its gradient needs g, and the backward pass computes the chunks again.

Tokens that the mask leaves out are sorted to the end of each row, and chunks without a token are never visited: a batch whose prompts
are masked pays for its completions only.

The function that this must equal is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Unembed = Callable[[Any, jax.Array], jax.Array]
DIFFERENTIABLE = ("logps", "mean_logps")
"""The outputs through which gradients flow unless `token_logps` is told otherwise."""


def reference(
    unembed: Unembed, head: Any, hidden: Float[Array, "b t d"], targets: Int[Array, "b t"], mask: Float[Array, "b t"]
) -> dict[str, Float[Array, "b t"]]:
    """Return what `token_logps` returns, from the whole logits at once; here the entropy has its gradient in any case."""
    log_p = jax.nn.log_softmax(unembed(head, _without_padding(hidden, mask)), axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    found = {
        "logps": chosen,
        "mean_logps": jnp.mean(log_p, axis=-1),
        "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "greedy": jax.lax.stop_gradient(chosen >= jnp.max(log_p, axis=-1)).astype(jnp.float32),
        "log_collision": jax.lax.stop_gradient(jax.nn.logsumexp(2 * log_p, axis=-1)),
    }
    return {name: jnp.where(mask > 0, value, 0.0) for name, value in found.items()}


def token_logps(
    unembed: Unembed,
    head: Any,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    chunk: int,
    outputs: tuple[str, ...] = ("logps",),
    differentiable: tuple[str, ...] = DIFFERENTIABLE,
) -> dict[str, Float[Array, "b t"]]:
    """Score `targets[b, t]` under the logits of `hidden[b, t]`.

    Args:
      unembed: `(head, hidden [..., d]) -> logits [..., v]`, float32.
      head: its parameters; gradients flow into them.
      hidden: `[b, t, d]`.
      targets: int `[b, t]`.
      mask: `[b, t]`; results are 0 where it is 0, and so are gradients.
      chunk: tokens of each row whose logits exist at a time.
      outputs: which of `logps`, `mean_logps` (mean over the vocabulary), `entropy`, `greedy` and `log_collision` to return.
      differentiable: through which of them gradients flow, of `logps`, `mean_logps` and `entropy`; each costs a matmul and, where the
        head is frozen, an array the size of `hidden`.

    Returns:
      `{name: float32 [b, t]}`.
    """
    if unknown := set(outputs) - {"logps", "mean_logps", "entropy", "greedy", "log_collision"}:
        raise ValueError(f"token_logps: there is no output {sorted(unknown)[0]!r}.")
    time = hidden.shape[1]
    chunk = -(-time // -(-time // max(1, min(chunk, time))))  # of the same size, so that the last is not nearly empty
    # Counted tokens first, each row in its own order, then padding up to whole chunks.
    order = jnp.argsort(mask <= 0, axis=1, stable=True)
    gathered = _gather_rows(order, _without_padding(hidden, mask), targets, mask)
    padded = tuple(jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2)) for x in gathered)
    live = tuple(name for name in differentiable if name in outputs)
    sorted_out = _scan_chunks(unembed, chunk, outputs, live, head, *padded)
    back = jnp.argsort(order, axis=1)
    return {name: jnp.take_along_axis(value[:, :time], back, axis=1) for name, value in sorted_out.items()}


def _without_padding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Zero what the mask leaves out: a padded token may hold anything, and 0 · NaN is not 0."""
    return jnp.where((mask > 0)[..., None], hidden, jnp.zeros((), hidden.dtype))


def _gather_rows(order: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
    return (
        jnp.take_along_axis(hidden, order[:, :, None], axis=1),
        jnp.take_along_axis(targets, order, axis=1),
        jnp.take_along_axis(mask, order, axis=1),
    )


class _Softmax:
    """Logits `[..., v]` and what is needed of them: exp(logits - top), written once and read by all, its sum, and log Σ exp(logits)."""

    def __init__(self, logits: jax.Array):
        self.logits = logits
        self.top = jnp.max(logits, axis=-1)
        # Without the barrier XLA takes the exponential again for every reader, which costs a CPU a fifth of the head's time.
        self.exponentials = jax.lax.optimization_barrier(jnp.exp(logits - self.top[..., None]))
        self.total = jnp.sum(self.exponentials, axis=-1)
        self.normalizer = self.top + jnp.log(self.total)


def _statistics(softmax: _Softmax, targets: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    logits, normalizer = softmax.logits, softmax.normalizer
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    found = {
        "logps": chosen - normalizer,
        "mean_logps": jnp.mean(logits, axis=-1) - normalizer,
        "entropy": jax.lax.stop_gradient(normalizer - jnp.sum(softmax.exponentials * logits, axis=-1) / softmax.total),
        "greedy": jax.lax.stop_gradient(chosen >= softmax.top).astype(jnp.float32),
        "log_collision": jax.lax.stop_gradient(jnp.log(jnp.sum(jnp.square(softmax.exponentials), axis=-1)) - 2 * jnp.log(softmax.total)),
    }
    return {name: jnp.where(mask > 0, value, 0.0) for name, value in found.items()}


def _logits_gradient(name: str, softmax: _Softmax, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Return of each token by itself d logps / d logits = onehot - p, d mean_logps = 1/v - p, or d entropy = -p (log p + entropy)."""
    shape, p = softmax.logits.shape, softmax.exponentials / softmax.total[..., None]
    if name == "entropy":
        log_p = softmax.logits - softmax.normalizer[..., None]
        return jnp.where((mask > 0)[..., None], -p * (log_p - jnp.sum(p * log_p, axis=-1, keepdims=True)), 0.0)
    ids = jax.lax.broadcasted_iota(targets.dtype, shape, len(shape) - 1)
    drawn = (ids == targets[..., None]).astype(jnp.float32) if name == "logps" else jnp.full(shape, 1.0 / shape[-1], jnp.float32)
    return jnp.where((mask > 0)[..., None], drawn - p, 0.0)


def _num_chunks(chunk: int, mask: jax.Array) -> jax.Array:
    return (jnp.max(jnp.sum(mask > 0, axis=1)) + chunk - 1) // chunk


def _slices(chunk: int, index: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1) for x in arrays]


def _write(chunk: int, index: jax.Array, into: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, value.astype(into.dtype), index * chunk, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _scan_chunks(unembed, chunk, outputs, live, head, hidden, targets, mask):
    def body(index, found):
        h, y, m = _slices(chunk, index, hidden, targets, mask)
        stats = _statistics(_Softmax(unembed(head, h)), y, m)
        return {name: _write(chunk, index, found[name], stats[name]) for name in outputs}

    empty = {name: jnp.zeros(targets.shape, jnp.float32) for name in outputs}
    return jax.lax.fori_loop(0, _num_chunks(chunk, mask), body, empty)


def _forward(unembed, chunk, outputs, live, head, hidden, targets, mask):
    head_is_trained = any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=_is_primal))
    head, hidden, targets, mask = jax.tree.map(lambda leaf: leaf.value, (head, hidden, targets, mask), is_leaf=_is_primal)
    if head_is_trained:
        return _scan_chunks(unembed, chunk, outputs, live, head, hidden, targets, mask), (head, hidden, targets, mask, None)

    def body(index, carry):
        found, units = carry
        h, y, m = _slices(chunk, index, hidden, targets, mask)
        logits, pullback = jax.vjp(partial(unembed, head), h)
        softmax = _Softmax(logits)
        stats = _statistics(softmax, y, m)
        for name in live:
            unit = pullback(_logits_gradient(name, softmax, y, m))[0]
            units = {**units, name: _write(chunk, index, units[name], unit)}
        return {name: _write(chunk, index, found[name], stats[name]) for name in outputs}, units

    empty = {name: jnp.zeros(targets.shape, jnp.float32) for name in outputs}
    units = {name: jnp.zeros_like(hidden) for name in live}
    found, units = jax.lax.fori_loop(0, _num_chunks(chunk, mask), body, (empty, units))
    return found, (None, hidden, targets, mask, units)


def _backward(unembed, chunk, outputs, live, residuals, cotangents):
    head, hidden, targets, mask, units = residuals
    cotangents = {name: _dense(cotangents[name], targets.shape) for name in live}
    nothing = (_no_gradient(targets), jnp.zeros_like(mask))
    if units is not None:
        parts = [cotangents[name][..., None] * unit.astype(jnp.float32) for name, unit in units.items()]
        return (None, sum(parts, jnp.zeros(hidden.shape, jnp.float32)).astype(hidden.dtype), *nothing)

    def body(index, carry):
        d_head, d_hidden = carry
        h, y, m = _slices(chunk, index, hidden, targets, mask)
        logits, pullback = jax.vjp(unembed, head, h)
        given = {name: _slices(chunk, index, cotangents[name])[0][..., None] for name in cotangents}
        softmax = _Softmax(logits)
        more, here = pullback(sum(g * _logits_gradient(name, softmax, y, m) for name, g in given.items()))
        return jax.tree.map(_accumulate, d_head, more), _write(chunk, index, d_hidden, here)

    start = (jax.tree.map(_accumulator, head), jnp.zeros_like(hidden))
    d_head, d_hidden = jax.lax.fori_loop(0, _num_chunks(chunk, mask), body, start)
    return (jax.tree.map(_as_cotangent, d_head, head), d_hidden, *nothing)


def _is_primal(leaf) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _dense(cotangent, shape) -> jax.Array:
    return jnp.zeros(shape, jnp.float32) if isinstance(cotangent, jax.custom_derivatives.SymbolicZero) else cotangent


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _no_gradient(x):
    return np.zeros(x.shape, jax.dtypes.float0)


def _accumulator(x):
    return jnp.zeros(x.shape, jnp.float32) if _is_float(x) else jnp.zeros((), jnp.float32)


def _accumulate(total, x):
    return total + x.astype(jnp.float32) if x.dtype != jax.dtypes.float0 else total


def _as_cotangent(total, x):
    return total.astype(x.dtype) if _is_float(x) else _no_gradient(x)


_scan_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
