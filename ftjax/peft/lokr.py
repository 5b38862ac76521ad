"""LoKr: a Kronecker product of a small matrix and another one that is small or of low rank."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import Added, check_rank, riding, scale_of, uniform
from ftjax.types import Transform, pytree, static
from ftjax.weights import Leaf


@pytree
class LokrWeight(Added):
    """`materialize() == base + scale * kron(w1, w2)`, where `w = w_a @ w_b` for the one that is factored."""

    base: Leaf
    """`[..., i, o]` with i = i1 i2, o = o1 o2."""
    w1: jax.Array | None = None
    """`[..., i1, o1]`; or `w1_a [..., i1, r]` and `w1_b [..., r, o1]`."""
    w2: jax.Array | None = None
    """`[..., i2, o2]`; or `w2_a` and `w2_b`."""
    w1_a: jax.Array | None = None
    w1_b: jax.Array | None = None
    w2_a: jax.Array | None = None
    w2_b: jax.Array | None = None
    scale: float = static(default=1.0)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        w1 = jnp.matmul(self.w1_a, self.w1_b) if self.w1 is None else self.w1
        return self.scale * w1, jnp.matmul(self.w2_a, self.w2_b) if self.w2 is None else self.w2

    def delta(self) -> jax.Array:
        w1, w2 = self.factors()
        return jnp.einsum("...pm,...qn->...pqmn", w1, w2).reshape(self.base.shape)

    def push(self, x: jax.Array) -> jax.Array:
        w1, w2 = self.factors()
        x = x.astype(jnp.float32).reshape(*x.shape[:-1], w1.shape[0], w2.shape[0])
        y = jnp.einsum("...pn,pm->...mn", weights.dot(x, w2), w1)
        return y.reshape(*x.shape[:-2], self.base.shape[-1])

    def pull(self, x: jax.Array) -> jax.Array:
        w1, w2 = self.factors()
        x = x.astype(jnp.float32).reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
        y = jnp.einsum("...mq,pm->...pq", weights.dot_transposed(x, w2), w1)
        return y.reshape(*x.shape[:-2], self.base.shape[-2])

    def rows(self, ids: jax.Array) -> jax.Array:
        w1, w2 = self.factors()
        high, low = w1[ids // w2.shape[0]], w2[ids % w2.shape[0]]
        return (high[..., :, None] * low[..., None, :]).reshape(*ids.shape, self.base.shape[-1])


def factorize(size: int, factor: int) -> tuple[int, int]:
    """Return `(m, n)` with m n = size: m = factor if that divides it, else the largest divisor up to it and up to √size; -1: no limit."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = max(m for m in range(1, largest + 1) if size % m == 0)
    return m, size // m


def lokr(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    decompose_factor: int = -1,
    decompose_both: bool = False,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "lokr",
) -> Transform:
    """Add a Kronecker product.

    W' = W + s · W₁ ⊗ W₂,   W₁ `[i₁, o₁]`,   W₂ = A₂ B₂ `[i₂, o₂]`,   s = alpha / rank

    Yeh et al. (LyCORIS), 2023, arXiv 2309.14859. Each side is split in two near its square root (64 = 8 · 8, 127 = 1 · 127).
    A factor is trained whole where `2 rank ≥ max(its sides)`, W₁ always unless `decompose_both`. Started as PEFT's: W₁ (or its B) 0, the
    rest U(±1/√fan); LyCORIS starts W₂ at 0 instead, and takes s = 1 where both factors are whole.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None, which makes the scale 1.
      decompose_factor: the largest i₁ and o₁, at least 1; -1: as near to the square root as there is a divisor.
      decompose_both: factor W₁ too where it is large enough.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the rank or the factor is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 64, 36))}}}
      >>> frozen, trainable = lokr(["q_proj"], rank=2).init(jax.random.key(0), params)
      >>> [(path.rsplit("/", 1)[1], leaf.shape) for path, leaf in tree.flatten(trainable).items()]
      [('w1', (2, 8, 6)), ('w2_a', (2, 8, 2)), ('w2_b', (2, 2, 6))]
    """
    if decompose_factor != -1 and decompose_factor < 1:
        raise ValueError(f"{name}: decompose_factor is -1 or at least 1, not {decompose_factor}.")

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        check_rank(name, rank, path, shape)
        *stack, i, o = shape
        (i1, i2), (o1, o2) = factorize(i, decompose_factor), factorize(o, decompose_factor)
        first, second, third = jax.random.split(key, 3)
        if decompose_both and 2 * rank < max(i1, o1):
            made = {"w1_a": uniform(first, (*stack, i1, rank), i1), "w1_b": jnp.zeros((*stack, rank, o1))}
        else:
            made = {"w1": jnp.zeros((*stack, i1, o1))}
        if 2 * rank < max(i2, o2):
            return made | {"w2_a": uniform(second, (*stack, i2, rank), i2), "w2_b": uniform(third, (*stack, rank, o2), rank)}
        return made | {"w2": uniform(second, (*stack, i2, o2), i2)}

    leaf = functools.partial(LokrWeight, scale=scale_of(name, rank, alpha))
    options = {
        "rank": rank,
        "alpha": rank if alpha is None else alpha,
        "decompose_factor": decompose_factor,
        "decompose_both": decompose_both,
    }
    return riding(make, leaf, name=name, targets=targets, exclude=exclude, layers=layers, options=options)


LOKR = Format(
    peft_type="LOKR",
    tensors={
        "w1": Tensor("lokr_w1", "xy->yx", optional=True),
        "w1_a": Tensor("lokr_w1_b", "xr->rx", optional=True),
        "w1_b": Tensor("lokr_w1_a", "ry->yr", optional=True),
        "w2": Tensor("lokr_w2", "zw->wz", optional=True),
        "w2_a": Tensor("lokr_w2_b", "zr->rz", optional=True),
        "w2_b": Tensor("lokr_w2_a", "rw->wr", optional=True),
    },
    options={"rank": "r", "alpha": "alpha", "decompose_factor": "decompose_factor", "decompose_both": "decompose_both"},
    defaults={
        "rank_pattern": {},
        "alpha_pattern": {},
        "r": 8,
        "alpha": 8,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "decompose_both": False,
        "decompose_factor": -1,
        "rank_dropout_scale": False,
        "exclude_modules": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    },
    ignored=("rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "init_weights"),
)
