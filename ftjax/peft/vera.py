"""VeRA: one pair of random matrices for the whole model, and two small vectors for each matrix it is added to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax import tree, weights
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.projections import TorchGenerator, kaiming
from ftjax.peft.riding import Added, as_last, check_range, riding
from ftjax.peft.shared import Shared
from ftjax.types import Params, Transform, pytree, static
from ftjax.weights import Leaf


@pytree
class VeraWeight(Added):
    """`materialize() == base + a[:i] * lambda_d @ b[:, :o] * lambda_b`."""

    base: Leaf
    """`[..., i, o]`."""
    lambda_d: jax.Array
    """`[..., r]`."""
    lambda_b: jax.Array
    """`[..., o]`."""
    a: Shared = static()
    """`[at least i, r]`."""
    b: Shared = static()
    """`[r, at least o]`."""

    def _sliced(self) -> tuple[jax.Array, jax.Array]:
        i, o = self.base.shape[-2:]
        return self.a.array[:i], self.b.array[:, :o]

    def delta(self) -> jax.Array:
        a, b = self._sliced()
        return jnp.einsum("ir,...r,ro,...o->...io", a, self.lambda_d, b, self.lambda_b)

    def push(self, x: jax.Array) -> jax.Array:
        a, b = self._sliced()
        low = checkpoint_name(weights.dot(x, a), weights.LOW_RANK)
        return _scaled(weights.dot(_scaled(low, self.lambda_d), b), self.lambda_b)

    def pull(self, x: jax.Array) -> jax.Array:
        a, b = self._sliced()
        low = weights.dot_transposed(_scaled(x, self.lambda_b), b)
        return weights.dot_transposed(_scaled(low, self.lambda_d), a)

    def rows(self, ids: jax.Array) -> jax.Array:
        a, b = self._sliced()
        low = a[ids]
        return _scaled(weights.dot(_scaled(low, self.lambda_d), b), self.lambda_b)


def _scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * as_last(by, x)).astype(x.dtype)


def vera(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 256,
    d_initial: float = 0.1,
    seed: int = 0,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "vera",
) -> Transform:
    """Add a random low-rank term whose inner and outer channels are scaled by trained vectors.

    y = x W + ((x A) ⊙ λ_d) B ⊙ λ_b        λ_d = d_initial, λ_b = 0 at the start

    Kopiczko et al., 2024, arXiv 2310.11454, equation 2: r + o numbers for each matrix. A `[largest i, r]` and B `[r, largest o]` are
    random, frozen and one for the whole model: a smaller matrix uses their first rows and columns (in the paper all have one shape). They
    are uniform with the bounds ±√(6 / largest i) and ±√(6 / r), the very numbers that PEFT draws for `projection_prng_key=seed`, and live
    in the frozen tree as `vera/a` and `vera/b` (`name` for `vera`): put other ones there before the training to use those. `attach`
    takes them out, so a model never sees them.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, at least 1; it may be larger than the matrices.
      d_initial: where λ_d starts; not 0, or nothing would ever move.
      seed: of A and B.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable and in the frozen tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the rank or d_initial is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = vera(["q_proj"], rank=3).init(jax.random.key(0), params)
      >>> {path: leaf.shape for path, leaf in tree.flatten(trainable).items()}
      {'vera/layers/q_proj/kernel/lambda_b': (2, 6), 'vera/layers/q_proj/kernel/lambda_d': (2, 3)}
      >>> frozen["vera"]["a"].shape, frozen["vera"]["b"].shape
      ((4, 3), (3, 6))
    """
    if d_initial == 0:
        raise ValueError(f"{name}: with d_initial 0 no gradient reaches either vector; the paper uses 0.1.")

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        check_range(name, "rank", rank, 2**16, path, shape)
        *layers, _, o = shape
        return {"lambda_d": jnp.full((*layers, rank), d_initial, jnp.float32), "lambda_b": jnp.zeros((*layers, o))}

    def freeze(shapes: dict[str, tuple[int, ...]]) -> Params:
        i, o = (max(shape[axis] for shape in shapes.values()) for axis in (-2, -1))
        generator = TorchGenerator(seed)
        a, b = kaiming(generator, (rank, i)), kaiming(generator, (o, rank))
        return {"a": jnp.asarray(a.T), "b": jnp.asarray(b.T)}

    options = {"rank": rank, "d_initial": d_initial, "seed": seed}
    return riding(make, VeraWeight, name=name, targets=targets, exclude=exclude, layers=layers, freeze=freeze, options=options)


VERA = Format(
    peft_type="VERA",
    tensors={"lambda_b": Tensor("vera_lambda_b", "o->o"), "lambda_d": Tensor("vera_lambda_d", "r->r")},
    shared={"a": Tensor("base_model.vera_A", "xr->rx", optional=True), "b": Tensor("base_model.vera_B", "ry->yr", optional=True)},
    options={"rank": "r", "d_initial": "d_initial", "seed": "projection_prng_key"},
    defaults={
        "r": 256,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    },
    ignored=("save_projection", "vera_dropout", "init_weights"),
)
