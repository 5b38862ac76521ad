"""From a family's declaration to a `Model`: embedding, a scan over stacked layers, a final norm, an output head.

The modules are built once, abstractly, and split into a graph definition, which is static, and parameters, which are a plain nested
dict from then on. The scan slices the stacked parameters layer by layer (a `Weight` with them) and merges each slice with the definition
of one layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax import tree, weights
from ftjax.kernels import attention as attention_op
from ftjax.kernels.attention import mask
from ftjax.models import layers, rope, virtual
from ftjax.models.config import Config, problems
from ftjax.types import Model, Params

REMAT: Mapping[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "elementwise": functools.partial(
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(weights.PRODUCT, weights.LOW_RANK)
    ),
}
"""What the backward pass computes again of a layer: nothing; all of it from its input; or all but its matrix products, which are stored."""

SLOTS = "slots"
"""The branch of the stacked layers that is empty in a model and filled by methods that add to a layer (see `layers.Scene`)."""

EVERYTHING = 1 << 30
"""The window of a layer that sees everything, where other layers of the same scan do not."""


class Family(NamedTuple):
    """One model family: all that is said of it stands in its own file."""

    model_type: str
    """As in Hugging Face's `config.json`."""
    architecture: str
    """The class that `transformers` loads it with."""
    layer: Callable[..., nnx.Module]
    """`layer(config, rngs=…)`: the declaration of one layer, called as `layer(x, scene, cached) -> (x, cached)`."""
    defaults: Mapping[str, Any]
    """The keys of `config.json` that shape this family, each with the value that stands for its absence."""
    layer_types: Callable[[Mapping[str, Any]], Sequence[str]] = lambda raw: ("full_attention",) * raw["num_hidden_layers"]
    """The type of each layer where `config.json` has no `layer_types`."""
    norm_center: float = 0.0
    """See `layers.RMSNorm`."""
    embedding_scale: Callable[[Config], float] | None = None
    """The factor of the embedded tokens."""


class Ends(nnx.Module):
    """What is not stacked: the embedding, the final norm and, unless it is tied, the output head."""

    def __init__(self, config: Config, family: Family, *, rngs: nnx.Rngs):
        self.embed_tokens = layers.Embed(config, rngs=rngs)
        self.norm = layers.RMSNorm(config.hidden_size, config, center=family.norm_center)
        if not config.tie_word_embeddings:
            self.lm_head = layers.Linear(config.hidden_size, config.vocab_size, config, rngs=rngs)


def make_model(
    config: Config,
    family: Family,
    *,
    remat: str = "none",
    dtype: str | None = None,
    scan: bool = True,
    attention: str = "auto",
    group_tokens: int | None = None,
) -> Model:
    """Return the model of one architecture; see `ftjax.models.build`."""
    if remat not in REMAT:
        raise ValueError(f"models: there is no remat {remat!r}; nearest: {tree.nearest(remat, REMAT)}.")
    if found := problems(config):
        raise ValueError(f"models: {config.model_type}: " + "; ".join(found) + ".")
    q, k = (jnp.empty((0, 0, heads, 0)) for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention_op.chosen(attention, q=q, k=k, group_tokens=group_tokens)
    ends, layer = (
        nnx.split(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))[0]
        for make in (lambda rngs: Ends(config, family, rngs=rngs), lambda rngs: family.layer(config, rngs=rngs))
    )
    trunk = _Trunk(config, family, ends, layer, REMAT[remat], None if dtype is None else jnp.dtype(dtype), scan, attention, group_tokens)
    return Model(
        config, functools.partial(_init, config, family), functools.partial(_apply, trunk), _head, functools.partial(_unembed, config)
    )


class _Trunk(NamedTuple):
    config: Config
    family: Family
    ends: nnx.GraphDef
    layer: nnx.GraphDef
    remat: Callable[[Callable], Callable]
    dtype: jnp.dtype | None
    scan: bool
    attention: str
    group_tokens: int | None


class _PerLayer(NamedTuple):
    """What differs from layer to layer, each stacked over layers, or that of one of them."""

    params: Params
    index: jax.Array
    window: jax.Array | None
    rope: jax.Array


def _init(config: Config, family: Family, key: jax.Array) -> Params:
    ends_key, layers_key = jax.random.split(key)

    def layer(key: jax.Array) -> Params:
        return _parameters(family.layer(config, rngs=nnx.Rngs(key)))

    stacked = jax.vmap(layer)(jax.random.split(layers_key, config.num_hidden_layers))
    return {**_parameters(Ends(config, family, rngs=nnx.Rngs(ends_key))), "layers": stacked}


def _parameters(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _apply(trunk: _Trunk, params: Params, tokens: jax.Array, *, positions=None, segment_ids=None, cache=None):
    """Return `(hidden [b, t, d], cache)`; see `ftjax.types.Model.apply`."""
    if positions is None:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32) + (0 if cache is None else cache.index - cache.virtual)
        positions = jnp.broadcast_to(steps[None, :], tokens.shape)
    segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    ends = nnx.merge(trunk.ends, {name: value for name, value in params.items() if name in ("embed_tokens", "norm", "lm_head")})
    x = ends.embed_tokens(tokens)
    x = x.astype(trunk.dtype or x.dtype)
    row, cache = virtual.put_first(params, x, positions, segment_ids, cache)
    x = row.x
    if trunk.family.embedding_scale is not None:
        x = x * jnp.asarray(trunk.family.embedding_scale(trunk.config), x.dtype)
    ids = (row.kv_positions, row.kv_segment_ids)
    scene = layers.Scene(
        None, None, row.positions, row.segment_ids, None, trunk.attention, None, row.start, *ids, group_tokens=trunk.group_tokens
    )
    cached = None if cache is None else (cache.k, cache.v)
    x, cached = _through_layers(trunk, params, x, cached, scene)
    if cache is not None:
        cache = dataclasses.replace(cache, k=cached[0], v=cached[1])
    return ends.norm(x[:, -tokens.shape[1] :]), cache


def _through_layers(trunk: _Trunk, params: Params, x: jax.Array, cached: layers.KeysValues, scene: layers.Scene):
    config = trunk.config
    tables = [rope.table(r, config.head_dim, scene.positions) for r in _ropes(config)]
    if isinstance(params["layers"], tuple):
        tables = jax.lax.optimization_barrier(tables)  # else XLA:CPU takes sine and cosine again for each head of each layer
    uniform = config.uniform_window
    mixed = len(set(config.windows)) > 1  # some layers look further than others, so the window is scanned
    if trunk.group_tokens is not None and any(virtual.count(params)):
        raise ValueError("models: a prompt or a prefix is in no group of shifted sparse attention; train it without group_tokens.")
    if uniform is not None and any(virtual.count(params)):
        uniform = jnp.asarray(uniform, jnp.int32)  # as an int it would leave out keys by their place in the row

    def body(carry, per_layer: _PerLayer):
        x, cached = carry
        layer = nnx.merge(trunk.layer, {name: branch for name, branch in per_layer.params.items() if name != SLOTS})
        cos, sin = tables[0] if len(tables) == 1 else (_pick(per_layer.rope, pair) for pair in zip(*tables, strict=True))
        window = per_layer.window if mixed else uniform
        here = scene._replace(cos=cos, sin=sin, window=window, layer=per_layer.index, slots=per_layer.params.get(SLOTS, {}))
        return layer(x, here, cached), None

    per_layer = _PerLayer(
        params["layers"],
        jnp.arange(config.num_hidden_layers, dtype=jnp.int32),
        jnp.asarray([EVERYTHING if w is None else w for w in config.windows], jnp.int32) if mixed else None,
        jnp.asarray([kind == "sliding_attention" for kind in config.layer_types]),
    )
    body, carry = trunk.remat(body), (x, cached)
    if isinstance(params["layers"], tuple):
        return _one_by_one(body, carry, per_layer)
    if trunk.scan:
        return jax.lax.scan(body, carry, per_layer)[0]
    for layer in range(config.num_hidden_layers):
        carry, _ = body(carry, jax.tree.map(lambda stacked, layer=layer: stacked[layer], per_layer))
    return carry


def _one_by_one(body, carry, per_layer: _PerLayer):
    """Go through layers that lie apart (see `ftjax.models.apart`), each with its own part of the cache."""
    (x, cached), kept = carry, []
    for layer, params in enumerate(per_layer.params):
        own = None if cached is None else (cached[0][layer], cached[1][layer])
        rest = jax.tree.map(lambda stacked, layer=layer: stacked[layer], per_layer._replace(params=()))
        (x, own), _ = body((x, own), rest._replace(params=params))
        kept.append(own)
    return x, None if cached is None else tuple(zip(*kept, strict=True))


def _ropes(config: Config) -> list:
    return [config.rope] if config.local_rope is None else [config.rope, config.local_rope]


def _pick(sliding: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.where(sliding, pair[1], pair[0])


def _head(params: Params) -> Params:
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def _unembed(config: Config, head: Params, hidden: jax.Array) -> jax.Array:
    if "lm_head" in head:
        logits = weights.dot(hidden, head["lm_head"]["kernel"])
    else:
        logits = weights.dot_transposed(hidden, head["embed_tokens"]["kernel"])
    return mask.cap(logits.astype(jnp.float32), config.final_logit_softcapping)
