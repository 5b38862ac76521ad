"""HiRA: a low-rank matrix times the frozen one, entry by entry, so that the change has a high rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import Added, check_rank, riding, uniform
from ftjax.types import Transform, pytree
from ftjax.weights import Leaf


@pytree
class HiraWeight(Added):
    """`materialize() == base * (1 + a @ b)`."""

    base: Leaf
    """`[..., i, o]`."""
    a: jax.Array
    """`[..., i, r]`."""
    b: jax.Array
    """`[..., r, o]`."""

    def delta(self) -> jax.Array:
        return weights.materialize(self.base).astype(jnp.float32) * jnp.matmul(self.a, self.b)

    def rows(self, ids: jax.Array) -> jax.Array:
        return weights.embed(ids, self.base).astype(jnp.float32) * weights.dot(self.a[ids], self.b)


def hira(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 32,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "hira",
) -> Transform:
    """Change every entry of a frozen matrix by a factor that a low-rank product gives.

    W' = W + W ⊙ (A B)

    Huang et al., 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (ICLR). A `[i, r]` ~ U(-1/√i, 1/√i), B
    `[r, o]` = 0, as PEFT starts them. There is no scale. A layer forms its dense change and multiplies by it, as PEFT does: twice the
    time of the frozen product.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the rank is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = hira(["q_proj"], rank=3).init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'hira/layers/q_proj/kernel/a': (2, 4, 3), 'hira/layers/q_proj/kernel/b': (2, 3, 6)}
    """

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        check_rank(name, rank, path, shape)
        *stack, i, o = shape
        return {"a": uniform(key, (*stack, i, rank), i), "b": jnp.zeros((*stack, rank, o))}

    return riding(make, HiraWeight, name=name, targets=targets, exclude=exclude, layers=layers, options={"rank": rank})


HIRA = Format(
    peft_type="HIRA",
    tensors={"a": Tensor("hira_A", "ir->ri"), "b": Tensor("hira_B", "ro->or")},
    options={"rank": "r"},
    defaults={
        "r": 32,
        "exclude_modules": None,
        "hira_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
    },
    ignored=("hira_dropout", "init_weights"),
)
