"""BOFT: a rotation of the inputs as a product of sparse ones, which mix near channels first and distant ones after."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.oft import cayley, check_block, rotate
from ftjax.peft.riding import as_last, riding
from ftjax.types import Transform, pytree
from ftjax.weights import Leaf, Wrapper


@pytree
class BoftWeight(Wrapper):
    """`materialize() == rotation @ base * outputs`, the rotation a product of permuted block diagonals."""

    base: Leaf
    """`[..., i, o]`."""
    blocks: jax.Array
    """`[..., m, i / n, n, n]`: of each, the skew-symmetric half counts."""
    outputs: jax.Array
    """`[..., o]`: a factor for each column."""

    def rotations(self) -> jax.Array:
        """Return the blocks as rotations, `[..., m, i / n, n, n]`."""
        return cayley(0.5 * (self.blocks - jnp.swapaxes(self.blocks, -1, -2)))

    def neutral(self) -> BoftWeight:
        return dataclasses.replace(super().neutral(), outputs=jnp.ones_like(self.outputs))

    def dot(self, x: jax.Array) -> jax.Array:
        y = weights.dot(self._turn(x).astype(x.dtype), self.base)
        return (y.astype(jnp.float32) * as_last(self.outputs, y)).astype(x.dtype)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        scaled = (x.astype(jnp.float32) * as_last(self.outputs, x)).astype(x.dtype)
        return self._turn_back(weights.dot_transposed(scaled, self.base)).astype(x.dtype)

    def materialize(self) -> jax.Array:
        if self.base.shape[:-2]:
            return jax.vmap(BoftWeight.materialize)(self)
        dense = weights.materialize(self.base)
        scaled = dense.astype(jnp.float32) * as_last(self.outputs, dense)
        return self._turn_back(scaled.T).T.astype(dense.dtype)

    def _turn(self, x: jax.Array) -> jax.Array:
        return _through(x, self.rotations()[::-1], range(self.blocks.shape[-4])[::-1])

    def _turn_back(self, x: jax.Array) -> jax.Array:
        return _through(x, jnp.swapaxes(self.rotations(), -1, -2), range(self.blocks.shape[-4]))


def _through(x: jax.Array, rotations: jax.Array, factors: range) -> jax.Array:
    for blocks, factor in zip(rotations, factors, strict=True):
        order = butterfly(x.shape[-1], blocks.shape[-1], factor)
        x = rotate(x[..., np.argsort(order)], blocks)[..., order]
    return x


def butterfly(size: int, block_size: int, factor: int) -> np.ndarray:
    """Return the order in which factor 0, 1, … takes the channels: within block_size · 2^factor of them even half-blocks, then odd ones."""
    if factor == 0:
        return np.arange(size)
    return np.arange(size).reshape(-1, 2**factor, 2, block_size // 2).swapaxes(1, 2).ravel()


def boft(
    targets: tree.Filter = "all-linear",
    *,
    block_size: int = 4,
    factors: int = 1,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "boft",
) -> Transform:
    """Rotate the inputs of frozen matrices by a butterfly of block rotations, and scale their outputs.

    y = (x R_m … R₁) W ⊙ s,   R_k = P_k diag(R_k1, …) P_kᵀ,   R_kj = (I - Q)(I + Q)⁻¹,   2 Q = B - Bᵀ;   B = 0, s = 1 at the start

    Liu et al., 2023, arXiv 2311.06243 (there on the other side of W; s as in OFT). The order of
    channels is PEFT's; PEFT without its CUDA kernel refuses more than one factor silently, this does not. B holds n² numbers a block of
    which n (n - 1) / 2 matter, as in PEFT. Not here: dropout of blocks.

    Args:
      targets: which matrices (see `ftjax.tree`).
      block_size: n, at least 2; even if there is more than one factor.
      factors: m, at least 1; n 2^(m - 1) must divide i. With n 2^(m - 1) = i every channel reaches every other.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; a size is out of range or no divisor.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 8, 6))}}}
      >>> frozen, trainable = boft(["q_proj"], block_size=2, factors=3).init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'boft/layers/q_proj/kernel/blocks': (2, 3, 4, 2, 2), 'boft/layers/q_proj/kernel/outputs': (2, 6)}
    """
    if factors < 1 or (factors > 1 and block_size % 2):
        raise ValueError(f"{name}: factors is at least 1, and more than one needs an even block_size; not {factors} of {block_size}.")

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        *stack, i, o = shape
        check_block(name, block_size, block_size * 2 ** (factors - 1), path, shape)
        return {"blocks": jnp.zeros((*stack, factors, i // block_size, block_size, block_size)), "outputs": jnp.ones((*stack, o))}

    options = {"block_size": block_size, "factors": factors}
    neutral = {"outputs": 1.0}
    return riding(make, BoftWeight, name=name, targets=targets, exclude=exclude, layers=layers, neutral=neutral, options=options)


BOFT = Format(
    peft_type="BOFT",
    tensors={"blocks": Tensor("boft_R", "mnst->mnst"), "outputs": Tensor("boft_s", "o->o1", neutral=1.0)},
    options={"block_size": "boft_block_size", "factors": "boft_n_butterfly_factor"},
    defaults={
        "boft_block_size": 4,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": 1,
        "exclude_modules": None,
        "boft_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    },
    ignored=("boft_dropout", "init_weights"),
)
