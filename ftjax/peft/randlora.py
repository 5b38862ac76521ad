"""RandLoRA: a change of full rank from random low-rank bases, of which only the scales are trained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.projections import BASES, TorchGenerator
from ftjax.peft.riding import Added, check_rank, riding, scale_of
from ftjax.peft.shared import Shared
from ftjax.types import Params, Transform, pytree, static
from ftjax.weights import Leaf


@pytree
class RandloraWeight(Added):
    """`materialize() == base + scale * thin @ wide` for i ≤ o, else the transposes: see `factors`."""

    base: Leaf
    """`[..., i, o]`."""
    lambdas: jax.Array
    """`[..., r, n]`: a scale for each column of each of n bases."""
    gammas: jax.Array
    """`[..., n, min(i, o)]`: a scale for each entry of the smaller side."""
    a: Shared = static()
    """`[r, at least min(i, o)]`."""
    b: Shared = static()
    """`[at least max(i, o), at least n, r]`."""
    scale: float = static(default=1.0)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return `[..., i, r n]` and `[..., r n, o]`, whose product is the change."""
        i, o = self.base.shape[-2:]
        r, n = self.lambdas.shape[-2:]
        small = jnp.einsum("...rn,rm,...nm->...rnm", self.lambdas, self.a.array[:, : min(i, o)], self.gammas)
        small = self.scale * small.reshape(*small.shape[:-3], r * n, min(i, o))
        # PEFT lays the one side out as r · n and the other as n · r; both are random, so it is as good a sum, and kept for its files.
        large = self.b.array[: max(i, o), :n].reshape(max(i, o), n * r)
        stack = small.shape[:-2]
        if i <= o:
            return jnp.swapaxes(small, -1, -2), jnp.broadcast_to(large.T, (*stack, n * r, o))
        return jnp.broadcast_to(large, (*stack, i, n * r)), small

    def delta(self) -> jax.Array:
        return jnp.matmul(*self.factors())

    def push(self, x: jax.Array) -> jax.Array:
        first, second = self.factors()
        return weights.dot(weights.dot(x, first), second)

    def pull(self, x: jax.Array) -> jax.Array:
        first, second = self.factors()
        return weights.dot_transposed(weights.dot_transposed(x, second), first)

    def rows(self, ids: jax.Array) -> jax.Array:
        first, second = self.factors()
        return weights.dot(first[ids], second)


def randlora(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 32,
    alpha: float | None = None,
    bases: str = "uniform",
    seed: int = 0,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "randlora",
) -> Transform:
    """Add a sum of random low-rank matrices, scaled by trained diagonals, that has full rank.

    W' = W + s · Σ_n B_n Λ_n A Γ_n,   n = 1 … ⌈min(i, o) / r⌉,   s = alpha / rank;   Λ = 0 and Γ = 1 / min(i, o) at the start

    Albert et al., 2025, arXiv 2502.00987. A `[r, smaller side]` and B `[larger side, n, r]` are random, frozen, of unit
    variance and one for the whole model, as in VeRA: the numbers that PEFT draws for `projection_prng_key=seed`. They live in the frozen
    tree as `randlora/a` and `randlora/b` (`name` for `randlora`); put other ones there to use those. PEFT pairs the columns of B with the
    rows of A in another order than the equation, and so does this.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix: a smaller one trains more numbers, (r + smaller side) · n.
      alpha: numerator of the scale; 20 · `rank` if None, as the paper and PEFT have it.
      bases: how A and B are drawn: "uniform", or of -1, 0 and 1, "sparse" (a third of them not zero) and "very_sparse" (1/√d of them).
      seed: of A and B.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable and in the frozen tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the rank is out of range; there are no such bases.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = randlora(["q_proj"], rank=3).init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'randlora/layers/q_proj/kernel/gammas': (2, 2, 4), 'randlora/layers/q_proj/kernel/lambdas': (2, 3, 2)}
    """
    if bases not in BASES:
        raise ValueError(f"{name}: there are no bases {bases!r}; nearest: {tree.nearest(bases, BASES)}.")
    alpha = 20.0 * rank if alpha is None else alpha

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        check_rank(name, rank, path, shape)
        *stack, i, o = shape
        small = min(i, o)
        count = -(-small // rank)
        return {"lambdas": jnp.zeros((*stack, rank, count)), "gammas": jnp.full((*stack, count, small), 1 / small, jnp.float32)}

    def freeze(shapes: dict[str, tuple[int, ...]]) -> Params:
        sides = [max(shape[axis] for shape in shapes.values()) for axis in (-2, -1)]
        a, b = BASES[bases](TorchGenerator(seed), rank, min(sides), max(sides))
        return {"a": jnp.asarray(a), "b": jnp.asarray(b)}

    leaf = functools.partial(RandloraWeight, scale=scale_of(name, rank, alpha))
    options = {"rank": rank, "alpha": alpha, "bases": bases, "seed": seed}
    return riding(make, leaf, name=name, targets=targets, exclude=exclude, layers=layers, freeze=freeze, options=options)


RANDLORA = Format(
    peft_type="RANDLORA",
    tensors={"lambdas": Tensor("randlora_lambda", "rn->rn"), "gammas": Tensor("randlora_gamma", "nm->nm")},
    shared={
        "a": Tensor("base_model.randlora_A", "rx->r1x", optional=True),
        "b": Tensor("base_model.randlora_B", "ynr->ynr", optional=True),
    },
    options={"rank": "r", "alpha": "randlora_alpha", "seed": "projection_prng_key"},
    writes={"sparse": lambda options: options["bases"] == "sparse", "very_sparse": lambda options: options["bases"] == "very_sparse"},
    reads={"bases": lambda config: "very_sparse" if config["very_sparse"] else "sparse" if config["sparse"] else "uniform"},
    defaults={
        "r": 32,
        "projection_prng_key": 0,
        "save_projection": True,
        "sparse": False,
        "very_sparse": False,
        "randlora_dropout": 0.0,
        "fan_in_fan_out": False,
        "randlora_alpha": 640,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    },
    ignored=("save_projection", "randlora_dropout", "init_weights"),
)
