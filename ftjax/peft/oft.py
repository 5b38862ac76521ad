"""OFT: the inputs of a frozen matrix are rotated in blocks, so that angles between its neurons stay."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import riding
from ftjax.types import Transform, pytree, static
from ftjax.weights import Leaf, Wrapper


def cayley(skew: jax.Array, neumann_terms: int = 0) -> jax.Array:
    """Return the rotations of skew-symmetric matrices Q `[..., n, n]`.

    (I - Q)(I + Q)⁻¹, exact; or I + 2 Q + … + 2 Qᵏ + Qᵏ⁺¹ of that many terms. The series is, as in PEFT, that of the inverse rotation.
    """
    eye = jnp.broadcast_to(jnp.eye(skew.shape[-1], dtype=skew.dtype), skew.shape)
    if neumann_terms == 0:
        return jnp.linalg.solve(eye + skew, eye - skew)
    total, power = eye, eye
    for _ in range(neumann_terms - 2):
        power = jnp.matmul(power, skew)
        total = total + 2.0 * power
    return total + jnp.matmul(power, skew)


def rotate(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """Return x with each `n` of its channels multiplied by one of the blocks `[i / n, n, n]`, float32."""
    split = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, blocks.shape[-1])
    return jnp.einsum("...kp,kpq->...kq", split, blocks).reshape(x.shape)


@pytree
class OftWeight(Wrapper):
    """`materialize() == block_diagonal(rotations()) @ base`."""

    base: Leaf
    """`[..., i, o]`."""
    skew: jax.Array
    """`[..., i / n or 1, n (n - 1) / 2]`: the upper triangle of Q for each block, or for all of them."""
    block_size: int = static()
    neumann_terms: int = static(default=0)

    def rotations(self) -> jax.Array:
        """Return the blocks, `[..., i / n, n, n]`."""
        rows, columns = np.triu_indices(self.block_size, 1)
        upper = jnp.zeros((*self.skew.shape[:-1], self.block_size, self.block_size), jnp.float32).at[..., rows, columns].set(self.skew)
        blocks = cayley(upper - jnp.swapaxes(upper, -1, -2), self.neumann_terms)
        *stack, i, _ = self.base.shape
        return jnp.broadcast_to(blocks, (*stack, i // self.block_size, self.block_size, self.block_size))

    def materialize(self) -> jax.Array:
        base = weights.materialize(self.base)
        *stack, i, o = base.shape
        split = base.astype(jnp.float32).reshape(*stack, -1, self.block_size, o)
        return jnp.matmul(self.rotations(), split).reshape(base.shape).astype(base.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        return weights.dot(rotate(x, self.rotations()).astype(x.dtype), self.base)

    def dot_transposed(self, x: jax.Array) -> jax.Array:
        return rotate(weights.dot_transposed(x, self.base), jnp.swapaxes(self.rotations(), -1, -2)).astype(x.dtype)


def oft(
    targets: tree.Filter = "all-linear",
    *,
    block_size: int = 32,
    neumann_terms: int = 0,
    share: bool = False,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "oft",
) -> Transform:
    """Rotate the inputs of frozen matrices.

    y = (x R) W,   R = diag(R₁, …),   R_k = (I - Q_k)(I + Q_k)⁻¹,   Q_k skew-symmetric and 0 at the start

    Qiu et al., 2023, arXiv 2306.07280 (there R rotates the other side of W). The inverse is solved exactly, in float32. PEFT's
    default is a series of 5 terms instead (OFTv2, arXiv 2506.19847), which is only near a rotation, and whose sign is such that the same
    numbers turn the other way: `neumann_terms=5` reads its files. Not here: the constrained form, and dropout of blocks.

    Args:
      targets: which matrices (see `ftjax.tree`).
      block_size: n, at least 2, a divisor of i (PEFT takes another divisor with a warning).
      neumann_terms: 0: exact; else the number of terms, at least 4.
      share: one rotation for all blocks of a matrix.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; a size is out of range or no divisor.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 8, 6))}}}
      >>> frozen, trainable = oft(["q_proj"], block_size=4).init(jax.random.key(0), params)
      >>> trainable["oft"]["layers"]["q_proj"]["kernel"]["skew"].shape
      (2, 2, 6)
    """
    if neumann_terms != 0 and neumann_terms < 4:
        raise ValueError(f"{name}: neumann_terms is 0 (exact) or at least 4, not {neumann_terms}.")

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        *stack, i, _ = shape
        check_block(name, block_size, block_size, path, shape)
        return {"skew": jnp.zeros((*stack, 1 if share else i // block_size, block_size * (block_size - 1) // 2))}

    leaf = functools.partial(OftWeight, block_size=block_size, neumann_terms=neumann_terms)
    options = {"block_size": block_size, "neumann_terms": neumann_terms, "share": share}
    return riding(make, leaf, name=name, targets=targets, exclude=exclude, layers=layers, options=options)


def check_block(name: str, block_size: int, divisor: int, path: str, shape: tuple[int, ...]) -> None:
    """Refuse blocks that do not fill the inputs of a matrix, or that cannot turn."""
    i = shape[-2]
    if block_size < 2 or i % divisor:
        valid = [n for n in range(2, i + 1) if i % n == 0]
        near = min(valid, key=lambda n: abs(n - divisor), default=None)
        raise ValueError(
            f"{name}: blocks of {block_size} need {divisor} to divide the {i} rows of {path!r} {list(shape)}; nearest: {near}."
        )


OFT = Format(
    peft_type="OFT",
    tensors={"skew": Tensor("oft_R.weight", "ne->ne")},
    options={"block_size": "oft_block_size", "share": "block_share"},
    writes={
        "use_cayley_neumann": lambda options: options["neumann_terms"] > 0,
        "num_cayley_neumann_terms": lambda options: options["neumann_terms"] or 5,
    },
    reads={"neumann_terms": lambda config: config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else 0},
    defaults={
        "r": 0,
        "oft_block_size": 32,
        "module_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "exclude_modules": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "coft": False,
        "eps": 6e-05,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    },
    ignored=("module_dropout", "init_weights", "eps"),
)
