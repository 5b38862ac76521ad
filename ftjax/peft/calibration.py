"""What a few batches say of a model's matrices before training: the second moments of their inputs, and the gradients of their weights.

Both are gradients. A leaf that passes its input through a function whose derivative by a matrix of zeros is declared to be xᵀx gives the
moments by one backward pass through the model as it is, stacked and scanned; no hook, no list of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.full import full
from ftjax.types import Params, pytree
from ftjax.weights import Leaf, Wrapper

Loss = Callable[[Params, Any], jax.Array]
"""`(params, batch) -> scalar`, such as the summed negative log-likelihood of the tokens that a batch trains."""


@pytree
class Watched(Wrapper):
    """The base, and a place whose gradient is the second moment of what it was multiplied by."""

    base: Leaf
    moment: jax.Array
    """Zeros `[..., i, i]`."""

    def materialize(self) -> jax.Array:
        return weights.materialize(self.base)

    def dot(self, x: jax.Array) -> jax.Array:
        return weights.dot(_watch(x, self.moment), self.base)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return weights.dot_transposed(x, self.base)

    def embed(self, ids: jax.Array) -> jax.Array:
        return weights.embed(ids, self.base)


@jax.custom_vjp
def _watch(x: jax.Array, moment: jax.Array) -> jax.Array:
    """Return x; the "gradient" by `moment` is Σ x xᵀ over all rows whose own gradient is not zero.

    A token on which no loss depends, such as padding, gets no gradient and is not counted.
    """
    del moment
    return x


def _watch_backward(x: jax.Array, d_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    counted = jnp.any(d_x != 0, axis=-1, keepdims=True)
    rows = jnp.where(counted, x, jnp.zeros((), x.dtype)).astype(jnp.float32).reshape(-1, x.shape[-1])
    return d_x, jax.lax.dot_general(rows, rows, (((0,), (0,)), ((), ())))


_watch.defvjp(lambda x, moment: (x, x), _watch_backward)


def input_moments(loss: Loss, params: Params, batches: Iterable[Any], *, targets: tree.Filter = "all-linear") -> dict[str, jax.Array]:
    """Return Σ x xᵀ of the inputs of every target, `{path: float32 [..., i, i]}`, over all tokens of the batches that the loss depends on.

    Args:
      loss: of one batch.
      params: the model's, in any dtype.
      batches: a few; the sum is not divided.
      targets: which matrices (see `ftjax.tree`).

    Raises:
      ValueError: the filter matches nothing, or there is no batch.
    """
    flat = tree.flatten(params)
    paths = tree.matches(params, targets, who="calibration")

    @jax.jit
    def moments(params: Params, batch: Any) -> dict[str, jax.Array]:
        def watched(zeros: dict[str, jax.Array]) -> jax.Array:
            leaves = tree.flatten(params)
            return loss(tree.replace(params, {path: Watched(leaves[path], zero) for path, zero in zeros.items()}), batch)

        return jax.grad(watched)({path: jnp.zeros((*flat[path].shape[:-1], flat[path].shape[-2]), jnp.float32) for path in paths})

    return _total(moments(params, batch) for batch in batches)


def weight_gradients(loss: Loss, params: Params, batches: Iterable[Any], *, targets: tree.Filter = "all-linear") -> dict[str, jax.Array]:
    """Return Σ dL/dW of every target over the batches, `{path: float32 [..., i, o]}`.

    Args and Raises: as `input_moments`.
    """
    method = full(targets, name="calibration")

    @jax.jit
    def gradients(frozen: Params, trainable: Params, batch: Any) -> dict[str, jax.Array]:
        return tree.flatten(jax.grad(lambda trained: loss(method.attach(frozen, trained), batch))(trainable)["calibration"])

    leaves, paths = tree.flatten(params), tree.matches(params, targets, who="calibration")
    dense = {path: weights.materialize(leaves[path]) for path in paths}  # a packed matrix has a gradient as what it stands for
    frozen, trainable = method.init(jax.random.key(0), tree.replace(params, dense))
    return _total(gradients(frozen, trainable, batch) for batch in batches)


def _total(parts: Iterable[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    total: dict[str, jax.Array] = {}
    for part in parts:
        total = jax.tree.map(jnp.add, total, part) if total else part
    if not total:
        raise ValueError("calibration: there is no batch to learn from.")
    return total
