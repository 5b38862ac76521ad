"""LoHa: the entrywise product of two low-rank matrices, whose rank may reach the product of theirs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import Added, check_rank, riding, scale_of, uniform
from ftjax.types import Transform, pytree, static
from ftjax.weights import Leaf


@pytree
class LohaWeight(Added):
    """`materialize() == base + scale * (a1 @ b1) * (a2 @ b2)`."""

    base: Leaf
    """`[..., i, o]`."""
    a1: jax.Array
    """`[..., i, r]`, and so is `a2`."""
    b1: jax.Array
    """`[..., r, o]`, and so is `b2`."""
    a2: jax.Array
    b2: jax.Array
    scale: float = static(default=1.0)

    def delta(self) -> jax.Array:
        return self.scale * jnp.matmul(self.a1, self.b1) * jnp.matmul(self.a2, self.b2)

    def rows(self, ids: jax.Array) -> jax.Array:
        return self.scale * weights.dot(self.a1[ids], self.b1) * weights.dot(self.a2[ids], self.b2)


def loha(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "loha",
) -> Transform:
    """Add the Hadamard product of two low-rank matrices.

    W' = W + s · (A₁ B₁) ⊙ (A₂ B₂),   s = alpha / rank

    Hyeon-Woo et al. (FedPara), 2022, arXiv 2108.06098, proposition 1; as an adapter Yeh et al. (LyCORIS), 2023, arXiv 2309.14859.
    A₂ starts at 0 and the others as PEFT's: A₁ ~ U(±1/√i), B₁, B₂ ~ U(±1/√r) (LyCORIS: normal). 2 r (i + o) numbers for each matrix.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix; the rank of the change is at most r².
      alpha: numerator of the scale; `rank` if None, which makes the scale 1.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the rank is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = loha(["q_proj"], rank=3).init(jax.random.key(0), params)
      >>> [(path.rsplit("/", 1)[1], leaf.shape) for path, leaf in tree.flatten(trainable).items()]
      [('a1', (2, 4, 3)), ('a2', (2, 4, 3)), ('b1', (2, 3, 6)), ('b2', (2, 3, 6))]
    """

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        check_rank(name, rank, path, shape)
        *stack, i, o = shape
        first, second, third = jax.random.split(key, 3)
        b1, b2 = (uniform(key, (*stack, rank, o), rank) for key in (second, third))
        return {"a1": uniform(first, (*stack, i, rank), i), "b1": b1, "a2": jnp.zeros((*stack, i, rank)), "b2": b2}

    leaf = functools.partial(LohaWeight, scale=scale_of(name, rank, alpha))
    options = {"rank": rank, "alpha": rank if alpha is None else alpha}
    return riding(make, leaf, name=name, targets=targets, exclude=exclude, layers=layers, options=options)


LOHA = Format(
    peft_type="LOHA",
    tensors={
        "a1": Tensor("hada_w1_b", "ir->ri"),
        "b1": Tensor("hada_w1_a", "ro->or"),
        "a2": Tensor("hada_w2_b", "ir->ri"),
        "b2": Tensor("hada_w2_a", "ro->or"),
    },
    options={"rank": "r", "alpha": "alpha"},
    defaults={
        "rank_pattern": {},
        "alpha_pattern": {},
        "r": 8,
        "alpha": 8,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "exclude_modules": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    },
    ignored=("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
)
