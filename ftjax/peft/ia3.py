"""(IA)³: a learned factor for each output of keys and values, and for each input of the layer that leaves the feed-forward block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import riding
from ftjax.types import Transform, pytree
from ftjax.weights import Leaf, Wrapper


@pytree
class Rescaled(Wrapper):
    """`materialize() == inputs[:, None] * base * outputs[None, :]`, in float32 over a base of any kind; None is a factor of 1."""

    base: Leaf
    """`[..., i, o]`."""
    inputs: jax.Array | None = None
    """`[..., i]`."""
    outputs: jax.Array | None = None
    """`[..., o]`."""

    def materialize(self) -> jax.Array:
        dense = weights.materialize(self.base)
        rows = 1.0 if self.inputs is None else self.inputs[..., :, None]
        columns = 1.0 if self.outputs is None else self.outputs[..., None, :]
        return _times(_times(dense, rows), columns)

    def neutral(self) -> Rescaled:
        return dataclasses.replace(jax.tree.map(jnp.ones_like, dataclasses.replace(self, base=None)), base=self.base)

    def dot(self, x: jax.Array) -> jax.Array:
        return _scaled(weights.dot(_scaled(x, self.inputs), self.base), self.outputs)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return _scaled(weights.dot_transposed(_scaled(x, self.outputs), self.base), self.inputs)

    def embed(self, ids: jax.Array) -> jax.Array:
        rows = _scaled(weights.embed(ids, self.base), self.outputs)
        return rows if self.inputs is None else _times(rows, self.inputs[ids][..., None])


def _times(x: jax.Array, factor: jax.Array | float) -> jax.Array:
    factor = jnp.broadcast_to(jnp.asarray(factor, jnp.float32), x.shape)
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _scaled(x: jax.Array, vector: jax.Array | None) -> jax.Array:
    return x if vector is None else _times(x, vector)


def ia3(
    targets: tree.Filter = ("k_proj", "v_proj", "down_proj"),
    *,
    feedforward: tree.Filter | None = ("down_proj",),
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "ia3",
) -> Transform:
    """Multiply activations by learned vectors that start at 1.

    y = l ⊙ (x W)   for keys and values,        y = (l ⊙ x) W   for the output of the feed-forward block

    Liu et al., 2022, arXiv 2205.05638, section 3.3: per layer d_k + d_v + d_ff numbers. A bias is added after the product and is not
    scaled; PEFT scales it with the output, as the paper's T5, which has no biases, leaves open.

    Args:
      targets: which matrices (see `ftjax.tree`).
      feedforward: those of them whose input is scaled instead of their output; they need not be among the targets. None: none.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix.

    Example:
      >>> params = {"layers": {"k_proj": {"kernel": jnp.ones((2, 4, 6))}, "down_proj": {"kernel": jnp.ones((2, 8, 4))}}}
      >>> frozen, trainable = ia3(["k_proj", "down_proj"]).init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'ia3/layers/down_proj/kernel/inputs': (2, 8), 'ia3/layers/k_proj/kernel/outputs': (2, 6)}
    """
    is_feedforward = (lambda path: False) if feedforward is None else tree.predicate(feedforward)

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        *layers, i, o = shape
        return {"inputs": jnp.ones((*layers, i))} if is_feedforward(path) else {"outputs": jnp.ones((*layers, o))}

    neutral = {"inputs": 1.0, "outputs": 1.0}
    options = {"feedforward": None if feedforward is None else tree.describe(feedforward)}
    return riding(make, Rescaled, name=name, targets=targets, exclude=exclude, layers=layers, neutral=neutral, options=options)


IA3 = Format(
    peft_type="IA3",
    tensors={"inputs": Tensor("ia3_l", "i->1i", neutral=1.0), "outputs": Tensor("ia3_l", "o->o1", neutral=1.0)},
    lists={"feedforward": ("feedforward_modules", "inputs")},
    defaults={"exclude_modules": None, "feedforward_modules": None, "fan_in_fan_out": False, "init_ia3_weights": True},
    ignored=("init_ia3_weights",),
)
