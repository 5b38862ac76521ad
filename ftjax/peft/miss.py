"""MiSS: one small block of weights that every shard of the input shares."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import Added, check_range, riding
from ftjax.types import Transform, pytree
from ftjax.weights import Leaf


@pytree
class MissWeight(Added):
    """`materialize()[n, m] == base[n, m] + block[n % r, m % c]`."""

    base: Leaf
    """`[..., i, o]`."""
    block: jax.Array
    """`[..., r, c]`, c = o or a divisor of it."""

    def _wide(self) -> jax.Array:
        return jnp.concatenate([self.block] * (self.base.shape[-1] // self.block.shape[-1]), axis=-1)

    def delta(self) -> jax.Array:
        return jnp.take(self._wide(), jnp.arange(self.base.shape[-2]) % self.block.shape[-2], axis=-2)

    def push(self, x: jax.Array) -> jax.Array:
        rank = self.block.shape[-2]
        padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
        return weights.dot(jnp.sum(padded.reshape(*x.shape[:-1], -1, rank), axis=-2), self._wide())

    def pull(self, x: jax.Array) -> jax.Array:
        low = weights.dot_transposed(x.astype(jnp.float32), self._wide())
        return jnp.take(low, jnp.arange(self.base.shape[-2]) % self.block.shape[-2], axis=-1)

    def rows(self, ids: jax.Array) -> jax.Array:
        return weights.embed(ids % self.block.shape[-2], self._wide())


@pytree
class BatWeight(Added):
    """`materialize() == base + blocks[m] @ base[n, m] + blocks[m]` for each square block `[n, m]` of the base."""

    base: Leaf
    """`[..., i, o]`."""
    blocks: jax.Array
    """`[..., o / r, r, r]`."""

    def delta(self) -> jax.Array:
        rank = self.blocks.shape[-1]
        *stack, i, o = self.base.shape
        dense = weights.materialize(self.base).astype(jnp.float32).reshape(*stack, i // rank, rank, o // rank, rank)
        turned = jnp.einsum("...mpq,...nqmc->...npmc", self.blocks, dense)
        added = jnp.moveaxis(self.blocks, -3, -2)[..., None, :, :, :]
        return (turned + jnp.broadcast_to(added, turned.shape)).reshape(*stack, i, o)


FORMS = ("even", "mini", "bat")


def miss(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 64,
    form: str = "even",
    mini_rank: int = 1,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "miss",
) -> Transform:
    """Add a block of weights that is repeated along the input.

    y = x W + (Σ_n x[n r : (n + 1) r]) D,   D `[r, o]` = 0 at the start

    Kang and Yin, 2024, arXiv 2409.15371 (MiSS; its first version, Bone, has the form "bat"). Where r does not divide i the last shard is
    padded with zeros. The thin product costs half of LoRA's, for the sum over shards is no product.

    * even: as above, r o numbers for each matrix.
    * mini: D repeats `[r, mini_rank]` along the output, r · mini_rank numbers.
    * bat: W' = W + D_m W_nm + D_m for each r × r block of W, with one D_m `[r, r]` for each column of blocks: depends on W.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, from 1 to i; for bat a divisor of i and of o.
      form: one of `FORMS`; PEFT calls it `init_weights` (True, "mini", "bat").
      mini_rank: a divisor of o, for the form mini alone.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; there is no such form; a size is out of range or no divisor.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = miss(["q_proj"], rank=2).init(jax.random.key(0), params)
      >>> trainable["miss"]["layers"]["q_proj"]["kernel"]["block"].shape
      (2, 2, 6)
    """
    if form not in FORMS:
        raise ValueError(f"{name}: there is no form {form!r}; nearest: {tree.nearest(form, FORMS)}.")

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        *stack, i, o = shape
        check_range(name, "rank", rank, i, path, shape)
        if form == "bat" and (i % rank or o % rank):
            raise ValueError(f"{name}: bat needs a rank that divides both sides of {path!r} {list(shape)}; {rank} does not.")
        if form == "mini" and (mini_rank < 1 or o % mini_rank):
            raise ValueError(f"{name}: mini_rank {mini_rank} does not divide the {o} columns of {path!r} {list(shape)}.")
        if form == "bat":
            return {"blocks": jnp.zeros((*stack, o // rank, rank, rank))}
        return {"block": jnp.zeros((*stack, rank, mini_rank if form == "mini" else o))}

    leaf = BatWeight if form == "bat" else MissWeight
    options = {"rank": rank, "form": form, "mini_rank": mini_rank}
    return riding(make, leaf, name=name, targets=targets, exclude=exclude, layers=layers, options=options)


MISS = Format(
    peft_type="MISS",
    tensors={"block": Tensor("miss_block", "rc->rc"), "blocks": Tensor("miss_block", "nrs->nsr")},
    options={"rank": "r", "mini_rank": "mini_r", "form": "init_weights"},
    values={"form": {"even": True, "bat": "bat", "mini": "mini"}},
    defaults={
        "r": 64,
        "miss_dropout": 0.0,
        "mini_r": 1,
        "exclude_modules": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
    },
    ignored=("miss_dropout",),
)
