"""SHiRA: a few entries of a matrix, chosen once, are trained themselves."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.peft.format import Format, Tensor
from ftjax.peft.layers import Layers
from ftjax.peft.riding import Added, check_range, riding
from ftjax.types import Params, Transform, pytree
from ftjax.weights import Leaf


@pytree
class ShiraWeight(Added):
    """`materialize() == base` but at `places`, where `values` are added; each place occurs once."""

    base: Leaf
    """`[..., i, o]`."""
    values: jax.Array
    """`[..., n]`."""
    places: jax.Array
    """int32 `[..., n]`: row · o + column."""

    def delta(self) -> jax.Array:
        *stack, i, o = self.base.shape
        scatter = jnp.vectorize(
            lambda values, places: jnp.zeros(i * o, jnp.float32).at[places].set(values, unique_indices=True), signature="(n),(n)->(m)"
        )
        return scatter(self.values, self.places).reshape(*stack, i, o)


def shira(
    targets: tree.Filter = "all-linear",
    *,
    rank: int = 32,
    seed: int = 0,
    exclude: tree.Filter | None = None,
    layers: Layers | None = None,
    name: str = "shira",
) -> Transform:
    """Train a sparse change: as many random entries of each matrix as a LoRA of the same rank has numbers.

    W' = W + S,   S zero but at r (i + o) fixed places, and 0 at the start

    Bhardwaj et al., 2024, arXiv 2406.13175, the mask SHiRA-Rand (1 to 2 % of the entries there). Each layer has places of its own, drawn
    from `seed`; in PEFT all matrices of one shape share theirs, and its files bring the places along. They lie in the frozen tree as
    `shira/<path>/places` (`name` for `shira`); put other ones there to use those. The dense S is formed for a product, as in PEFT.

    Args:
      targets: which matrices (see `ftjax.tree`).
      rank: r, at least 1, with r (i + o) ≤ i o.
      seed: of the places.
      exclude: matrices to leave out among the targets.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`).
      name: the key in the trainable and in the frozen tree.

    Raises:
      ValueError: a filter matches nothing, or a leaf that is no matrix; the rank is out of range.

    Example:
      >>> params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> frozen, trainable = shira(["q_proj"], rank=1).init(jax.random.key(0), params)
      >>> trainable["shira"]["layers"]["q_proj"]["kernel"]["values"].shape
      (2, 10)
    """

    def make(key: jax.Array, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        del key
        *stack, i, o = shape
        check_range(name, "rank", rank, i * o // (i + o), path, shape)
        return {"values": jnp.zeros((*stack, rank * (i + o)))}

    def freeze(shapes: dict[str, tuple[int, ...]]) -> Params:
        return tree.unflatten({f"{path}/places": _places(seed, path, shape, rank) for path, shape in shapes.items()})

    options = {"rank": rank, "seed": seed}
    return riding(make, ShiraWeight, name=name, targets=targets, exclude=exclude, layers=layers, freeze=freeze, options=options)


def _places(seed: int, path: str, shape: tuple[int, ...], rank: int) -> jax.Array:
    *stack, i, o = shape
    random = np.random.default_rng((seed, zlib.crc32(path.encode())))
    layers = [np.sort(random.choice(i * o, rank * (i + o), replace=False, shuffle=False)) for _ in range(int(np.prod(stack)))]
    return jnp.asarray(np.array(layers, np.int32).reshape(*stack, rank * (i + o)))


def _to_indices(places: np.ndarray, i: int, o: int) -> np.ndarray:
    """Return PEFT's `[2, n]`: the output of each place, and its input."""
    return np.stack([places % o, places // o]).astype(np.int32)


def _from_indices(indices: np.ndarray, i: int, o: int) -> np.ndarray:
    return (indices[1].astype(np.int64) * o + indices[0].astype(np.int64)).astype(np.int32)


SHIRA = Format(
    peft_type="SHIRA",
    tensors={
        "values": Tensor("shira_weight", "n->n"),
        "places": Tensor("shira_indices", "n->2n", turn=(_to_indices, _from_indices), trained=False),
    },
    options={"rank": "r"},
    defaults={"r": 32, "mask_type": "random", "random_seed": None, "fan_in_fan_out": False, "init_weights": True},
    ignored=("mask_type", "random_seed", "init_weights"),
)
