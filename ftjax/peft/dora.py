"""DoRA: a matrix as the length of each column times its direction; LoRA moves the direction, a vector the length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax import tree, weights
from ftjax.peft import inits, low_rank
from ftjax.peft.format import Tensor
from ftjax.peft.inits import Init
from ftjax.peft.layers import Layers, on_layers
from ftjax.peft.lora import LORA, LowRankWeight, dropped
from ftjax.peft.riding import as_last
from ftjax.types import Params, Transform, pytree, static
from ftjax.weights import Leaf


@pytree
class DoraWeight(LowRankWeight):
    """`materialize() == (base + scale * a @ b) * ratio[None, :]`, in float32 over a base of any kind."""

    base: Leaf
    """`[..., i, o]`."""
    a: jax.Array
    """`[..., i, r]`."""
    b: jax.Array
    """`[..., r, o]`."""
    scale: jax.Array
    """`[...]`: alpha / rank for each stacked layer."""
    ratio: jax.Array
    """`[..., o]`: the trained length of each column over the length that `base + scale * a @ b` gives it."""
    key: jax.Array | None = None
    """`[...]`: a key for each stacked layer while training with dropout, else None."""
    dropout: float = static(default=0.0)

    def materialize(self) -> jax.Array:
        base = weights.materialize(self.base)
        return ((base.astype(jnp.float32) + self.delta()) * self.ratio[..., None, :]).astype(base.dtype)

    def neutral(self) -> DoraWeight:
        return dataclasses.replace(super().neutral(), ratio=jnp.ones_like(self.ratio))

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32) * as_last(self.ratio, x)
        low = weights.dot_transposed(wide, self.b) * self.scale
        base = weights.dot_transposed(wide.astype(x.dtype), self.base)
        return (base.astype(jnp.float32) + weights.dot_transposed(low, self.a)).astype(x.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        rows = weights.embed(ids, self.base)
        delta = weights.dot(weights.embed(ids, self.a) * self.scale, self.b)
        return ((rows.astype(jnp.float32) + delta) * as_last(self.ratio, rows)).astype(rows.dtype)

    def join(self, base: jax.Array, delta: jax.Array, x: jax.Array) -> jax.Array:
        # The gradient of the length needs the product before it is scaled; without its name a rematerialised layer would compute it twice.
        wide, ratio = checkpoint_name(base, weights.PRODUCT).astype(jnp.float32), as_last(self.ratio, base)
        if self.key is None:
            return ((wide + delta) * ratio).astype(base.dtype)
        again = weights.dot(dropped(x, self.key, self.dropout).astype(x.dtype), self.base).astype(jnp.float32)
        return (wide + (ratio - 1.0) * again + ratio * delta).astype(base.dtype)


def column_norms(base: Leaf, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `‖base + scale · a b‖` of each column, `[..., o]` in float32, a constant to the gradient.

    One layer after the other, so that no more than one dense matrix exists at a time; but XLA of JAX 0.10 on a CPU turns a whole bfloat16
    stack into float32 before the loop.
    """
    if len(base.shape) > 2:
        return jax.lax.map(lambda one: column_norms(*one), (base, a, b, scale))
    a, b = jax.lax.stop_gradient((a, b))
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale
    dense = jax.lax.stop_gradient(weights.materialize(base)).astype(jnp.float32) + delta
    return jnp.sqrt(jnp.sum(dense * dense, axis=0))


def dora(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    init: Init | str = "uniform",
    exclude: tree.Filter | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Layers | None = None,
    name: str = "dora",
) -> Transform:
    """Train the length of each column of frozen matrices, and their direction by a low-rank term.

    W' = m ⊙ (W + s A B) / ‖W + s A B‖,   one length for each output;   m = ‖W‖ at the start

    Liu et al., 2024, arXiv 2402.09353, equation 5. The norm is a constant to the gradient (section 4.3). It is taken once for all layers
    where `attach` joins the trees, that is once a step: the work of `rank` more tokens, one more reading of W, and one layer's matrix in
    float32 at a time. The backward pass keeps one more `[..., o]` for each matrix than LoRA's does. With dropout
    y = x W + (m/n − 1) · dropout(x) W + m/n · s · dropout(x) A B, as PEFT has it, which costs a second dense product. At the start the
    method is the identity bitwise where `attach` is not inside a larger `jit`, else to a rounding of m/n.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to the smaller side of the matrix.
      alpha: numerator of the scale; `rank` if None.
      rslora: divide by √rank instead of rank.
      dropout: probability, in [0, 1), of zeroing an entry of x; it acts only where `attach` is given a key.
      init: how A and B start, with A B = 0 (see `ftjax.peft.lora`).
      exclude: matrices to leave out among the targets.
      rank_pattern: other ranks for some of them, `{regex or module name: rank}`; the first match wins.
      alpha_pattern: other alphas likewise.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; a rank, alpha or dropout is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = dora(["q_proj"], rank=2).init(jax.random.key(0), params)
      >>> {path.rpartition("/")[2]: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'a': (2, 4, 2), 'b': (2, 2, 6), 'magnitude': (2, 6)}
    """
    make = inits.blind(init, name)
    spec = low_rank.LowRank("dora", name, targets, rank, alpha, rslora, dropout, exclude, rank_pattern, alpha_pattern)

    def init_fn(key: jax.Array, params: Params) -> tuple[Params, Params]:
        trained = {}
        for path, leaf, leaf_rank, leaf_key in spec.matrices(key, params):
            a, b = make(leaf_key, leaf.shape, leaf_rank)
            # Behind a barrier, or XLA knows that B is 0: its CPU fusions of JAX 0.12 multiply by constants that they have not written.
            norms = column_norms(leaf, a, jax.lax.optimization_barrier(b), spec.scales(path, leaf.shape))
            trained |= {f"{path}/a": a, f"{path}/b": b, f"{path}/magnitude": norms}
        return params, {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        leaves = {}
        for row in spec.joined(frozen, trainable, key=key):
            a, b, magnitude = (row.fields[field] for field in ("a", "b", "magnitude"))
            norms = column_norms(row.base, a, b, row.scale)
            # 0 stands for the length that a column has: of one that began as zeros, and of layers that `on_layers` leaves alone.
            ratio = jnp.where(magnitude != 0, magnitude / jnp.where(norms > 0, norms, 1.0), 1.0)
            leaves[row.path] = DoraWeight(row.base, a, b, row.scale, ratio, *row.dropout)
        return tree.replace(frozen, leaves)

    method = Transform(init_fn, attach, spec.plan)
    return method if layers is None else on_layers(method, layers)


DORA = LORA._replace(
    tensors={**LORA.tensors, "magnitude": Tensor("lora_magnitude_vector", "o->o")},
    mark="magnitude",
    constants={"use_dora": True},
)
