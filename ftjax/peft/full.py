"""Full fine-tuning of any part: the leaves move to the trainable tree, in float32, and leave a hole behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.peft.layers import Layers, chosen, chosen_of, stacked
from ftjax.types import Params, Plan, Transform, pytree, static
from ftjax.weights import Weight


@pytree
class Moved(Weight):
    """A hole in the frozen tree: the leaf that stood here is trained. It holds no array and knows shape and dtype."""

    hole_shape: tuple[int, ...] = static()
    hole_dtype: jnp.dtype = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hole_shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.hole_dtype

    def materialize(self) -> jax.Array:
        raise ValueError(
            "This leaf is trained in full and its value is in the trainable tree: use method.attach(frozen, trainable), not frozen."
        )


def full(targets: tree.Filter, *, exclude: tree.Filter | None = None, layers: Layers | None = None, name: str = "full") -> Transform:
    """Train the leaves that `targets` selects themselves; everything else stays frozen.

    The trained copy is float32 whatever the base's dtype, and is cast back where the model reads it, so small updates are not lost to
    bfloat16 rounding. The frozen tree then no longer holds the whole model: a reference policy needs a copy of it made before. With
    `layers` it does hold it: the layers that are trained are copies, written over the others' stack for each step.

    Args:
      targets: which leaves (see `ftjax.tree`); norms, biases and embeddings as well as matrices.
      exclude: leaves to leave frozen among them.
      layers: the layers that are trained, all if None (see `ftjax.peft.layers`); then no leaf may be outside the layers.
      name: the key in the trainable tree.

    Raises:
      ValueError: nothing matched; there is no such layer; or a leaf is not a plain array (a quantised matrix, say).

    Example:
      >>> params = {"norm": {"scale": jnp.ones(4, jnp.bfloat16)}, "lm_head": {"kernel": jnp.ones((4, 8), jnp.bfloat16)}}
      >>> method = full("norm/scale")
      >>> frozen, trainable = method.init(jax.random.key(0), params)
      >>> trainable["full"]["norm"]["scale"].dtype.name, method.attach(frozen, trainable)["norm"]["scale"].dtype.name
      ('float32', 'bfloat16')
    """

    def paths(params: Params) -> tuple[str, ...]:
        return tree.matches(params, targets, who=name, exclude=exclude)

    def indices(path: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.array(chosen(layers, stacked(path, shape, name)))

    def init(key: jax.Array, params: Params) -> tuple[Params, Params]:
        del key
        flat, holes, trained = tree.flatten(params), {}, {}
        for path in paths(params):
            if isinstance(flat[path], Weight):
                raise ValueError(f"{name}: {path!r} is a {type(flat[path]).__name__}, not a plain array, and cannot be trained in full.")
            if layers is None:
                holes[path] = Moved(flat[path].shape, flat[path].dtype)
            leaf = flat[path] if layers is None else flat[path][indices(path, flat[path].shape)]
            trained[path] = jnp.array(leaf, jnp.float32, copy=True)  # the state is donated, `params` must outlive it
        return tree.replace(params, holes), {name: tree.unflatten(trained)}

    def attach(frozen: Params, trainable: Params, *, key: jax.Array | None = None) -> Params:
        del key
        flat, leaves = tree.flatten(frozen), {}
        for path, value in tree.flatten(trainable[name]).items():
            if layers is not None and path in flat:
                leaves[path] = flat[path].at[indices(path, flat[path].shape)].set(value.astype(flat[path].dtype))
                continue
            if not isinstance(flat.get(path), Moved):
                raise ValueError(f"{name}: {path!r} is not free in the frozen tree; list {name!r} before the method that wraps it.")
            leaves[path] = value.astype(flat[path].dtype)
        return tree.replace(frozen, leaves)

    def plan(params: Params) -> tuple[Plan, ...]:
        found = paths(params)
        options = {} if layers is None else {"layers": chosen_of(layers, params, found, name)}
        return (Plan(name, tree.describe(targets), found, options),)

    return Transform(init, attach, plan)
