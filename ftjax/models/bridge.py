"""Anyone's Flax module, Linen or NNX, as a `Model`: so that every method, loss and command applies to it.

The module stays as it is. It multiplies by plain arrays, so leaves that a method has replaced (`ftjax.weights.Weight`) are made dense
before each call: right for training and merging, but an adapter costs what full fine-tuning costs in the forward pass, and a quantised
weight exists in full while it is used. The families of ftjax multiply through `ftjax.weights` and do not pay this.

By default the module sees tokens and nothing else: pad on the right and do not pack, or name its arguments for positions and segments.
A key/value cache is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from ftjax import tree, weights
from ftjax.types import Model, Params


def from_linen(
    module: linen.Module, *, head: str | None = None, tied: bool = False, positions: str | None = None, segment_ids: str | None = None
) -> Model:
    """Return a Linen module `tokens [b, t] -> logits [b, t, v]` or `-> hidden [b, t, d]` as a model.

    Args:
      module: unbound; its variables are the collection `params` alone.
      head: None if the module returns logits; else the path of the matrix that makes logits of its hidden states.
      tied: whether that matrix is an embedding `[v, d]` and not a kernel `[d, v]`.
      positions: the keyword by which the module takes the position of each token, None if it takes none.
      segment_ids: the same for the segments (0 is padding).

    Raises:
      ValueError: the module has variables beside parameters, or there is no leaf at `head`.
    """

    def init(key: jax.Array) -> Params:
        variables = module.init(key, jnp.zeros((1, 1), jnp.int32))
        others = sorted(set(variables) - {"params"})
        if others:
            raise ValueError(
                f"bridge: {type(module).__name__} has variables beside its parameters: {', '.join(others)}; only params are trained."
            )
        return _plain(variables["params"])

    def call(params: Params, tokens: jax.Array, keywords: Mapping[str, jax.Array]) -> jax.Array:
        return module.apply({"params": params}, tokens, **keywords)

    return _model(module, init, call, head, tied, positions, segment_ids)


def from_nnx(
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    head: str | None = None,
    tied: bool = False,
    positions: str | None = None,
    segment_ids: str | None = None,
) -> Model:
    """Return an NNX module `tokens [b, t] -> logits [b, t, v]` or `-> hidden [b, t, d]` as a model.

    Args:
      make: `make(rngs)` builds the module, in evaluation mode if it has dropout; it is built abstractly. `nnx_params` gives the
        parameters of one that exists.
      head: see `from_linen`.
      tied: see `from_linen`.
      positions: see `from_linen`.
      segment_ids: see `from_linen`.

    Raises:
      ValueError: there is no leaf at `head`.
    """
    graph, abstract, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    keys = {_path(path): path for path, _ in nnx.to_flat_state(abstract)}
    rest = jax.jit(lambda: nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)[2])()  # what is no parameter: states of dropout and the like

    def init(key: jax.Array) -> Params:
        return nnx_params(make(nnx.Rngs(key)))

    def call(params: Params, tokens: jax.Array, keywords: Mapping[str, jax.Array]) -> jax.Array:
        state = nnx.from_flat_state([(keys[path], leaf) for path, leaf in tree.flatten(params).items()])
        return nnx.merge(graph, state, rest)(tokens, **keywords)

    return _model(make, init, call, head, tied, positions, segment_ids)


def nnx_params(module: nnx.Module) -> Params:
    """Return the parameters of an NNX module as the tree that the model of `from_nnx` takes."""
    return _plain(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _model(config, init, call, head, tied, positions, segment_ids) -> Model:
    paths = tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    if head is not None and head not in paths:
        raise ValueError(f"bridge: there is no head {head!r} among the parameters; nearest: {tree.nearest(head, paths)}.")
    names = {"positions": positions, "segment_ids": segment_ids}

    def apply(params, tokens, *, positions=None, segment_ids=None, cache=None):
        if added := sorted(set(tree.flatten(params)) - set(paths)):
            raise ValueError(
                f"bridge: the parameters hold {added[0]!r}, for which this module has no place: a method that adds to a layer or to the "
                "input needs a model of ftjax.models."
            )
        if cache is not None:
            raise ValueError("bridge: a foreign module has no key/value cache; generate with a family of ftjax.")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
        segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
        given = {"positions": positions, "segment_ids": segment_ids}
        return call(weights.dense(params), tokens, {name: given[ours] for ours, name in names.items() if name is not None}), None

    def unembed(params: Params, hidden: jax.Array) -> jax.Array:
        if head is None:
            return hidden.astype(jnp.float32)
        product = weights.dot_transposed if tied else weights.dot
        return product(hidden, tree.flatten(params)[head]).astype(jnp.float32)

    return Model(config, init, apply, lambda params: {} if head is None else tree.partition(params, [head])[0], unembed)


def _plain(params: Mapping[Any, Any]) -> Params:
    """Return nested dicts whose keys are strings; the lists of NNX have integers."""
    return {str(key): _plain(value) if isinstance(value, Mapping) else value for key, value in params.items()}


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))
